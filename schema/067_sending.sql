-- Paced sending: what a session has begun with strangers, and what its channel refuses.

-- How many messages to strangers a session has begun on a day of its workspace. A claim counts in its own transaction, so
-- neither a restart nor another gateway forgets.
CREATE TABLE IF NOT EXISTS et_sending_days (
    tenant_id          BIGINT NOT NULL REFERENCES et_tenants (id) ON DELETE CASCADE,
    channel_session_id BIGINT NOT NULL,
    day                DATE NOT NULL,
    strangers          INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (channel_session_id, day),
    FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01);
CREATE INDEX IF NOT EXISTS et_sending_days_by_tenant ON et_sending_days (tenant_id, channel_session_id);

-- A channel that refuses strangers for now (WhatsApp 463, 475): until when, and in whose words.
CREATE TABLE IF NOT EXISTS et_sending_holds (
    tenant_id          BIGINT NOT NULL REFERENCES et_tenants (id) ON DELETE CASCADE,
    channel_session_id BIGINT NOT NULL PRIMARY KEY,
    until              TIMESTAMPTZ NOT NULL,
    code               TEXT NOT NULL,
    detail             TEXT NOT NULL,
    created_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS et_sending_holds_by_tenant ON et_sending_holds (tenant_id, channel_session_id);

DO $$
DECLARE
    name TEXT;
    own CONSTANT TEXT := 'tenant_id = (SELECT nullif(current_setting(''app.tenant_id'', true), '''')::BIGINT)';
BEGIN
    FOREACH name IN ARRAY ARRAY['et_sending_days', 'et_sending_holds'] LOOP
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE public.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('REVOKE ALL ON public.%I FROM PUBLIC, et_worker, et_api, et_backend', name);
        EXECUTE format('DROP POLICY IF EXISTS et_owner_all ON public.%I', name);
        EXECUTE format('CREATE POLICY et_owner_all ON public.%I TO CURRENT_USER USING (true) WITH CHECK (true)', name);
        EXECUTE format('DROP POLICY IF EXISTS et_worker_all ON public.%I', name);
        EXECUTE format('CREATE POLICY et_worker_all ON public.%I TO et_worker USING (true) WITH CHECK (true)', name);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON public.%I TO et_worker', name);
        EXECUTE format('DROP POLICY IF EXISTS et_api_own ON public.%I', name);
        EXECUTE format('CREATE POLICY et_api_own ON public.%I TO et_api USING (%s) WITH CHECK (%s)', name, own, own);
        EXECUTE format('GRANT SELECT ON public.%I TO et_api', name);
    END LOOP;
END
$$;
