-- Keys, references and checks of every table. A reference between tenant-owned rows names the tenant too,
-- so that no row can ever point into another tenant, whatever wrote it.

-- Adds what is missing; an adopted table may have the same key under another name.
CREATE OR REPLACE FUNCTION pg_temp.ensure_unique(tbl REGCLASS, cols TEXT[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM pg_index i
        WHERE i.indrelid = tbl AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indisvalid
          AND cols = (SELECT array_agg(a.attname::TEXT ORDER BY k.n)
                      FROM unnest(i.indkey::SMALLINT[]) WITH ORDINALITY k(attnum, n)
                      JOIN pg_attribute a ON a.attrelid = tbl AND a.attnum = k.attnum)
    ) THEN
        EXECUTE format('ALTER TABLE %s ADD UNIQUE (%s)', tbl, (SELECT string_agg(quote_ident(c), ', ') FROM unnest(cols) c));
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION pg_temp.ensure_constraint(tbl REGCLASS, conname TEXT, def TEXT) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM pg_constraint c WHERE c.conrelid = tbl AND c.conname = ensure_constraint.conname) THEN
        EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I %s', tbl, conname, def);
    END IF;
END
$$;

-- tenant_id of every tenant-owned table. An identical reference under another name is left alone.
CREATE OR REPLACE FUNCTION pg_temp.ensure_tenant(tbl REGCLASS) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM pg_constraint c
        WHERE c.conrelid = tbl AND c.contype = 'f' AND c.confrelid = 'public.et_tenants'::regclass AND c.confdeltype = 'c'
          AND c.conkey = ARRAY[(SELECT attnum FROM pg_attribute WHERE attrelid = tbl AND attname = 'tenant_id')]
    ) THEN
        EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I FOREIGN KEY (tenant_id) REFERENCES public.et_tenants (id) ON DELETE CASCADE',
                       tbl, tbl::TEXT || '_tenant_fk');
    END IF;
END
$$;

SELECT pg_temp.ensure_unique('public.et_tenants', '{id}');

SELECT pg_temp.ensure_tenant(t::regclass)
FROM unnest(ARRAY[
    'et_agents', 'et_workspaces', 'et_leads', 'et_lead_identities', 'et_lead_merges', 'et_suppressions',
    'et_channel_sessions', 'et_session_runtime', 'et_session_leases', 'et_session_credentials',
    'et_session_cursors', 'et_threads',
    'et_messages', 'et_inbound_claims', 'et_outbound_queue', 'et_parked_receipts', 'et_thread_insights',
    'et_decisions', 'et_audit_log', 'et_api_keys', 'et_events', 'et_db_roles'
]) t;

-- The targets of the composite references below. The id comes first: an index that begins with the tenant can be mistaken
-- for one that finds a row (see 003_indexes.sql).
SELECT pg_temp.ensure_unique(t::regclass, '{id,tenant_id}')
FROM unnest(ARRAY['et_agents', 'et_workspaces', 'et_leads', 'et_channel_sessions', 'et_threads', 'et_messages']) t;

SELECT pg_temp.ensure_unique('public.et_leads', '{tenant_id,external_id}');
SELECT pg_temp.ensure_unique('public.et_channel_sessions', '{tenant_id,channel_type,session_identifier}');
SELECT pg_temp.ensure_unique('public.et_messages', '{tenant_id,channel_session_id,lead_id,channel_message_id}');
SELECT pg_temp.ensure_unique('public.et_outbound_queue', '{message_id}');
SELECT pg_temp.ensure_unique('public.et_outbound_queue', '{tenant_id,dedupe_key}');
SELECT pg_temp.ensure_unique('public.et_thread_insights', '{thread_id}');
SELECT pg_temp.ensure_unique('public.et_decisions', '{message_id}');
SELECT pg_temp.ensure_unique('public.et_api_keys', '{key_hash}');

SELECT pg_temp.ensure_constraint(t::regclass, c, d)
FROM (VALUES
    ('et_tenants', 'et_tenants_status_ck', $$CHECK (status IN ('active', 'suspended'))$$),

    ('et_agents', 'et_agents_decider_ck', $$CHECK (decider IN ('rules', 'llm'))$$),

    ('et_workspaces', 'et_workspaces_agent_fk',
     'FOREIGN KEY (tenant_id, agent_id) REFERENCES et_agents (tenant_id, id) ON DELETE SET NULL (agent_id)'),

    ('et_leads', 'et_leads_workspace_fk',
     'FOREIGN KEY (tenant_id, workspace_id) REFERENCES et_workspaces (tenant_id, id) ON DELETE SET NULL (workspace_id)'),
    ('et_leads', 'et_leads_kind_ck', $$CHECK (kind IN ('person', 'group'))$$),
    ('et_leads', 'et_leads_external_id_ck', $$CHECK (external_id <> '')$$),

    ('et_lead_identities', 'et_lead_identities_lead_fk',
     'FOREIGN KEY (tenant_id, lead_id) REFERENCES et_leads (tenant_id, id) ON DELETE CASCADE'),
    ('et_lead_merges', 'et_lead_merges_lead_fk',
     'FOREIGN KEY (tenant_id, new_id) REFERENCES et_leads (tenant_id, id) ON DELETE CASCADE'),
    ('et_suppressions', 'et_suppressions_reason_ck', $$CHECK (reason IN ('erased', 'opted_out'))$$),

    ('et_channel_sessions', 'et_channel_sessions_type_ck', $$CHECK (channel_type ~ '^[a-z][a-z0-9_]{1,31}$')$$),
    ('et_channel_sessions', 'et_channel_sessions_identifier_ck', $$CHECK (session_identifier <> '')$$),
    ('et_channel_sessions', 'et_channel_sessions_status_ck',
     $$CHECK (status IN ('pairing', 'connecting', 'active', 'disconnected', 'logged_out', 'suspended'))$$),

    ('et_session_runtime', 'et_session_runtime_session_fk',
     'FOREIGN KEY (tenant_id, session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE'),
    ('et_session_runtime', 'et_session_runtime_wanted_ck', $$CHECK (wanted IN ('connected', 'disconnected'))$$),
    ('et_session_runtime', 'et_session_runtime_login_ck', $$CHECK (login_method IN ('qr', 'code'))$$),
    ('et_session_leases', 'et_session_leases_session_fk',
     'FOREIGN KEY (tenant_id, session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE'),
    ('et_session_credentials', 'et_session_credentials_session_fk',
     'FOREIGN KEY (tenant_id, session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE'),
    ('et_session_cursors', 'et_session_cursors_session_fk',
     'FOREIGN KEY (tenant_id, session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE'),

    ('et_threads', 'et_threads_lead_fk',
     'FOREIGN KEY (tenant_id, lead_id) REFERENCES et_leads (tenant_id, id) ON DELETE CASCADE'),
    ('et_threads', 'et_threads_session_fk',
     'FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id)'),
    ('et_threads', 'et_threads_agent_fk',
     'FOREIGN KEY (tenant_id, agent_id) REFERENCES et_agents (tenant_id, id) ON DELETE SET NULL (agent_id)'),
    ('et_threads', 'et_threads_status_ck', $$CHECK (status IN ('active', 'archived', 'closed'))$$),
    ('et_threads', 'et_threads_handled_by_ck', $$CHECK (handled_by IN ('agent', 'human'))$$),

    ('et_messages', 'et_messages_lead_fk',
     'FOREIGN KEY (tenant_id, lead_id) REFERENCES et_leads (tenant_id, id) ON DELETE CASCADE'),
    ('et_messages', 'et_messages_thread_fk',
     'FOREIGN KEY (tenant_id, thread_id) REFERENCES et_threads (tenant_id, id) ON DELETE CASCADE'),
    ('et_messages', 'et_messages_session_fk',
     'FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id)'),
    -- Written for speed: a regular expression is the dearest of a row's checks, so the usual channels come before it, and
    -- every INSERT reads its checks from the catalogue anew, where a list of constants takes twice as long as an array.
    ('et_messages', 'et_messages_channel_ck',
     $$CHECK (channel = ANY ('{whatsapp,email,telegram}') OR channel ~ '^[a-z][a-z0-9_]{1,31}$')$$),
    ('et_messages', 'et_messages_role_ck', $$CHECK (role IN ('user', 'assistant', 'system'))$$),
    ('et_messages', 'et_messages_type_ck', $$CHECK (message_type = ANY (
        '{text,image,video,audio,document,sticker,location,contact,poll,reaction,edited,deleted,unsupported}'))$$),
    -- Also keeps direction to its two values.
    ('et_messages', 'et_messages_status_ck', $$CHECK (CASE direction
        WHEN 'inbound' THEN delivery_status = ANY (
            '{received,inbound_processing,inbound_ai_replied,inbound_follow_up,inbound_human_takeover,inbound_ignored,inbound_error}')
        WHEN 'outbound' THEN delivery_status = ANY (
            '{queued,dispatching,sent,delivered,read,failed,unknown,cancelled}')
        ELSE false END)$$),

    ('et_inbound_claims', 'et_inbound_claims_message_fk',
     'FOREIGN KEY (tenant_id, message_id) REFERENCES et_messages (tenant_id, id) ON DELETE CASCADE'),

    ('et_outbound_queue', 'et_outbound_queue_message_fk',
     'FOREIGN KEY (tenant_id, message_id) REFERENCES et_messages (tenant_id, id) ON DELETE CASCADE'),
    ('et_outbound_queue', 'et_outbound_queue_session_fk',
     'FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id)'),
    ('et_outbound_queue', 'et_outbound_queue_status_ck',
     $$CHECK (status IN ('queued', 'dispatching', 'sent', 'failed', 'unknown', 'cancelled'))$$),
    ('et_outbound_queue', 'et_outbound_queue_retry_ck', 'CHECK (retry_count >= 0)'),

    ('et_parked_receipts', 'et_parked_receipts_session_fk',
     'FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE'),
    ('et_parked_receipts', 'et_parked_receipts_status_ck', $$CHECK (status IN ('sent', 'delivered', 'read', 'failed'))$$),

    ('et_thread_insights', 'et_thread_insights_thread_fk',
     'FOREIGN KEY (tenant_id, thread_id) REFERENCES et_threads (tenant_id, id) ON DELETE CASCADE'),
    ('et_thread_insights', 'et_thread_insights_lead_fk',
     'FOREIGN KEY (tenant_id, lead_id) REFERENCES et_leads (tenant_id, id) ON DELETE CASCADE'),

    ('et_decisions', 'et_decisions_message_fk',
     'FOREIGN KEY (tenant_id, message_id) REFERENCES et_messages (tenant_id, id) ON DELETE CASCADE'),
    ('et_decisions', 'et_decisions_thread_fk',
     'FOREIGN KEY (tenant_id, thread_id) REFERENCES et_threads (tenant_id, id) ON DELETE CASCADE'),
    ('et_decisions', 'et_decisions_reply_fk',
     'FOREIGN KEY (tenant_id, reply_message_id) REFERENCES et_messages (tenant_id, id) ON DELETE SET NULL (reply_message_id)'),
    ('et_decisions', 'et_decisions_action_ck',
     $$CHECK (action IN ('auto_reply', 'follow_up', 'human_takeover', 'ignore'))$$),

    ('et_events', 'et_events_kind_ck', $$CHECK (kind IN ('message', 'status', 'session', 'decision', 'insight'))$$)
) AS v(t, c, d);
