-- Roles and row-level security. The walls stand between tenants whatever SQL is sent:
-- et_worker sees every tenant, et_api the one its transaction names, a backend's login what et_db_roles says for
-- session_user. FORCE applies to the owner too, who therefore has a policy of its own.

-- Roles belong to the whole server: another database's migration may be making them at this very moment.
DO $$
DECLARE
    wanted TEXT;
    -- Before 16 every member could SET ROLE; since then the membership itself says so.
    may_set CONSTANT TEXT := CASE WHEN current_setting('server_version_num')::INT >= 160000 THEN 'SET' ELSE 'MEMBER' END;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['et_worker', 'et_api', 'et_backend'] LOOP
        FOR attempt IN 1..10 LOOP
            BEGIN
                IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = wanted) THEN
                    EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
                END IF;
                IF wanted <> 'et_backend' AND NOT pg_has_role(current_user, wanted, may_set) THEN
                    EXECUTE format('GRANT %I TO CURRENT_USER', wanted);
                END IF;
                EXIT;
            EXCEPTION
                WHEN duplicate_object OR unique_violation OR internal_error THEN
                    PERFORM pg_sleep(0.05);
                WHEN insufficient_privilege THEN
                    RAISE EXCEPTION 'the login % may not create the role % or become it', current_user, wanted
                        USING ERRCODE = 'insufficient_privilege',
                              HINT = format(E'An administrator must run:\n'
                                  '  CREATE ROLE et_worker NOLOGIN; CREATE ROLE et_api NOLOGIN; CREATE ROLE et_backend NOLOGIN;\n'
                                  '  GRANT et_worker, et_api TO %I;', current_user);
            END;
        END LOOP;
    END LOOP;
    IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname IN ('et_worker', 'et_api', 'et_backend') AND (rolsuper OR rolbypassrls)) THEN
        RAISE EXCEPTION 'a role of the gateway bypasses row-level security'
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'An administrator must run: ALTER ROLE et_worker NOSUPERUSER NOBYPASSRLS, and the same for et_api and et_backend.';
    END IF;
END
$$;

-- What a backend's login may see: the tenants that et_db_roles names for it. session_user cannot be changed by SET ROLE
-- or any setting. One call per query, as the policies ask for it in a sub-select.
CREATE OR REPLACE FUNCTION et_backend_tenants() RETURNS BIGINT[]
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE
        WHEN EXISTS (SELECT 1 FROM public.et_db_roles r WHERE r.role = session_user AND r.tenant_id IS NULL)
            THEN ARRAY(SELECT t.id::BIGINT FROM public.et_tenants t)
        ELSE ARRAY(SELECT r.tenant_id FROM public.et_db_roles r WHERE r.role = session_user)
    END
$$;

DO $$
DECLARE
    own CONSTANT TEXT := '%1$s = (SELECT nullif(current_setting(''app.tenant_id'', true), '''')::BIGINT)';
    backend CONSTANT TEXT := '%1$s = ANY ((SELECT public.et_backend_tenants())::BIGINT[])';
    t RECORD;
    api TEXT;
    seen TEXT;
BEGIN
    -- The table, its column with the tenant, what et_api may do in the own tenant, what et_backend may.
    FOR t IN
        SELECT * FROM (VALUES
            ('et_tenants',             'id',        'SELECT, UPDATE (name, settings)',        'SELECT'),
            ('et_agents',              'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_workspaces',          'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_leads',               'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_lead_identities',     'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_lead_merges',         'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         NULL),
            ('et_suppressions',        'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         NULL),
            ('et_channel_sessions',    'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_session_runtime',     'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         NULL),
            ('et_session_leases',      'tenant_id', 'SELECT',                                 NULL),
            ('et_session_credentials', 'tenant_id', NULL,                                     NULL),
            ('et_session_cursors',     'tenant_id', NULL,                                     NULL),
            ('et_threads',             'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_messages',            'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',
             'SELECT, INSERT (tenant_id, lead_id, thread_id, channel_session_id, channel, channel_message_id, '
             'channel_timestamp, occurred_at, direction, role, sender_identifier, chat_identifier, message_type, content, '
             'reply_to_message_id, media_url, media_metadata, raw_payload, delivery_status, llm_provider, llm_model, '
             'llm_prompt_tokens, llm_completion_tokens, llm_total_tokens, llm_estimated_cost_usd, created_at, updated_at)'),
            ('et_inbound_claims',      'tenant_id', NULL,                                     NULL),
            ('et_outbound_queue',      'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',
             'SELECT, INSERT (tenant_id, message_id, channel, channel_session_id, recipient, status, priority, retry_count, '
             'send_at, next_attempt_at, expires_at, dedupe_key, created_at, updated_at)'),
            ('et_parked_receipts',     'tenant_id', NULL,                                     NULL),
            ('et_thread_insights',     'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_decisions',           'tenant_id', 'SELECT, INSERT, UPDATE, DELETE',         'SELECT'),
            ('et_audit_log',           'tenant_id', 'SELECT, INSERT',                         NULL),
            -- Never the hashes: authentication goes through et_worker.
            ('et_api_keys',            'tenant_id',
             'SELECT (id, tenant_id, name, prefix, scopes, expires_at, revoked_at, last_used_at, created_at), '
             'INSERT (tenant_id, name, prefix, key_hash, scopes, expires_at), '
             'UPDATE (name, scopes, expires_at, revoked_at)',                                 NULL),
            ('et_events',              'tenant_id', 'SELECT',                                 'SELECT'),
            ('et_db_roles',            'tenant_id', NULL,                                     NULL),
            ('et_gateways',            NULL,        NULL,                                     NULL),
            ('et_legacy_threads',      'tenant_id', NULL,                                     NULL)
        ) AS v(name, col, api_may, backend_may)
    LOOP
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', t.name);
        EXECUTE format('ALTER TABLE public.%I FORCE ROW LEVEL SECURITY', t.name);
        EXECUTE format('REVOKE ALL ON public.%I FROM PUBLIC, et_worker, et_api, et_backend', t.name);

        EXECUTE format('DROP POLICY IF EXISTS et_owner_all ON public.%I', t.name);
        EXECUTE format('CREATE POLICY et_owner_all ON public.%I TO CURRENT_USER USING (true) WITH CHECK (true)', t.name);

        EXECUTE format('DROP POLICY IF EXISTS et_worker_all ON public.%I', t.name);
        EXECUTE format('CREATE POLICY et_worker_all ON public.%I TO et_worker USING (true) WITH CHECK (true)', t.name);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON public.%I TO et_worker', t.name);

        EXECUTE format('DROP POLICY IF EXISTS et_api_own ON public.%I', t.name);
        IF t.api_may IS NOT NULL THEN
            api := format(own, t.col);
            EXECUTE format('CREATE POLICY et_api_own ON public.%I TO et_api USING (%s) WITH CHECK (%s)', t.name, api, api);
            EXECUTE format('GRANT %s ON public.%I TO et_api', t.api_may, t.name);
        END IF;

        EXECUTE format('DROP POLICY IF EXISTS et_backend_reads ON public.%I', t.name);
        EXECUTE format('DROP POLICY IF EXISTS et_backend_sends ON public.%I', t.name);
        IF t.backend_may IS NOT NULL THEN
            seen := format(backend, t.col);
            EXECUTE format('CREATE POLICY et_backend_reads ON public.%I FOR SELECT TO et_backend USING (%s)', t.name, seen);
            EXECUTE format('GRANT %s ON public.%I TO et_backend', t.backend_may, t.name);
        END IF;
    END LOOP;
    EXECUTE format('CREATE POLICY et_backend_sends ON public.et_messages FOR INSERT TO et_backend WITH CHECK (%s '
                   'AND direction = ''outbound'' AND delivery_status = ''queued'' AND NOT is_history)',
                   format(backend, 'tenant_id'));
    EXECUTE format('CREATE POLICY et_backend_sends ON public.et_outbound_queue FOR INSERT TO et_backend WITH CHECK (%s '
                   'AND status = ''queued'' AND retry_count = 0)',
                   format(backend, 'tenant_id'));
    EXECUTE 'GRANT USAGE ON SCHEMA public TO et_worker, et_api, et_backend';
END
$$;

-- Ids of adopted tables come from sequences, which need a grant of their own; identity columns do not.
DO $$
DECLARE
    seq REGCLASS;
BEGIN
    FOR seq IN
        SELECT pg_get_serial_sequence('public.' || t, 'id')::regclass
        FROM unnest(ARRAY['et_tenants', 'et_agents', 'et_workspaces', 'et_leads', 'et_channel_sessions']) t
        WHERE pg_get_serial_sequence('public.' || t, 'id') IS NOT NULL
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO et_worker, et_api', seq);
    END LOOP;
END
$$;

-- Nobody may call a function of ours unless it says so here. Triggers run regardless.
DO $$
DECLARE
    f RECORD;
BEGIN
    FOR f IN
        SELECT p.oid::regprocedure AS signature, p.proname AS name, p.prorettype = 'trigger'::regtype AS is_trigger
        FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace
          AND starts_with(p.proname, 'et_')
          AND pg_get_userbyid(p.proowner) = current_user
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC, et_worker, et_api, et_backend', f.signature);
        IF NOT f.is_trigger THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO et_worker', f.signature);
        END IF;
        IF f.name IN ('et_enqueue_outbound', 'et_retry_outbound', 'et_merge_leads', 'et_link_identities', 'et_current_lead',
                      'et_external_id', 'et_address', 'et_lead_kind', 'et_default_workspace') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO et_api', f.signature);
        END IF;
        IF f.name IN ('et_enqueue_outbound', 'et_backend_tenants', 'et_external_id', 'et_address') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO et_backend', f.signature);
        END IF;
    END LOOP;
END
$$;
