# The gateway alone; see compose.yaml for gateway + PostgreSQL. One volume: /data (journal, media, WhatsApp keys).
FROM python:3.11-slim-bookworm

RUN apt-get update \
 && apt-get install -y --no-install-recommends libmagic1 \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --system --uid 10001 --create-home --home-dir /home/gateway gateway \
 && mkdir /data && chown gateway:gateway /data && chmod 700 /data

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY gateway gateway
COPY sandbox sandbox
COPY schema schema
RUN python -m venv .venv && .venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check .

USER gateway
ENV DATA_DIR=/data HOST=0.0.0.0 PORT=3000 PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
  CMD [".venv/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=4)"]
ENTRYPOINT [".venv/bin/python", "-m", "gateway"]
CMD ["serve"]
