// What the pages do by themselves; every form works without it. Nothing here writes HTML.
(() => {
  "use strict";

  // The server writes times in the reader's own zone.
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
  document.cookie = `tz=${zone}; path=/; max-age=31536000; SameSite=Strict`;

  // A conversation stays at its end while it grows, unless the reader has scrolled up.
  const follow = (box) => {
    const toEnd = () => { box.scrollTop = box.scrollHeight; };
    let atEnd = true;
    box.addEventListener("scroll", () => { atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60; }, { passive: true });
    new MutationObserver(() => { if (atEnd) toEnd(); }).observe(box, { childList: true, subtree: true, characterData: true });
    new ResizeObserver(() => { if (atEnd) toEnd(); }).observe(box);
    toEnd();
  };
  document.querySelectorAll("[data-follow]").forEach(follow);

  // Enter sends, Shift+Enter is a new line; on a touch keyboard Enter is a new line.
  document.addEventListener("keydown", (event) => {
    const box = event.target;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || !box.matches?.("textarea[data-send]")) return;
    if (matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    if (box.value.trim()) box.form.requestSubmit();
  });

  // A form that takes seconds says so, and is sent once.
  document.addEventListener("submit", (event) => {
    const button = event.target.dataset.busy && event.target.querySelector("button.primary");
    if (!button) return;
    if (button.getAttribute("aria-busy")) { event.preventDefault(); return; }
    button.setAttribute("aria-busy", "true");
    button.dataset.label = button.textContent;
    button.textContent = event.target.dataset.busy;
  });
  // Back from the page that followed: as it was.
  addEventListener("pageshow", () => document.querySelectorAll("button[aria-busy]").forEach((button) => {
    button.removeAttribute("aria-busy");
    button.textContent = button.dataset.label;
  }));

  // Whether what is shown is live.
  const connection = document.getElementById("connection");
  const say = (text, live) => {
    if (!connection || connection.textContent === text) return;
    connection.textContent = text;
    connection.classList.toggle("live", live);
  };
  document.addEventListener("htmx:sse:after:connection", () => say("Live", true));
  document.addEventListener("htmx:sse:error", (event) => {
    if (event.detail?.status === 401) location.reload();
    else say("Connection lost, trying again…", false);
  });
  document.addEventListener("signed-out", () => location.assign("/"));
})();
