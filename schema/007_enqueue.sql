-- Enqueueing and retrying: the functions a backend, the API and the workers share.

-- Whether the caller may act for a tenant. SECURITY DEFINER functions see the owner as current_user, so the caller is
-- the role that SET ROLE named, else the login. Neither can be forged by a setting: SET ROLE checks membership.
CREATE OR REPLACE FUNCTION et_may_act(p_tenant_id BIGINT) RETURNS BOOLEAN
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    caller TEXT := coalesce(nullif(current_setting('role', true), 'none'), session_user);
BEGIN
    IF caller = 'et_api' THEN
        RETURN p_tenant_id = nullif(current_setting('app.tenant_id', true), '')::BIGINT;
    ELSIF caller IN ('et_worker', current_user) OR pg_has_role(caller, 'et_worker', 'USAGE') THEN
        RETURN true;
    END IF;
    RETURN EXISTS (
        SELECT 1 FROM public.et_db_roles r
        WHERE r.role = session_user AND (r.tenant_id IS NULL OR r.tenant_id = p_tenant_id)
    );
END
$$;

-- The one form of an address: 'whatsapp:+60123456789', 'whatsapp-lid:…', 'whatsapp-group:<jid>', 'email:…', 'telegram:…'.
-- Takes what people write; raises invalid_parameter_value for what cannot be an address of that channel.
CREATE OR REPLACE FUNCTION et_external_id(p_channel TEXT, p_address TEXT) RETURNS TEXT
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    address TEXT := btrim(p_address);
BEGIN
    IF p_channel = 'whatsapp' THEN
        IF address ~ '^whatsapp-group:.+@g\.us$' OR address ~ '^whatsapp-lid:[0-9]+$' THEN
            RETURN address;
        ELSIF address ~ '^[0-9-]+@g\.us$' THEN
            RETURN 'whatsapp-group:' || address;
        ELSIF address ~ '^[0-9]+(:[0-9]+)?@lid$' THEN
            RETURN 'whatsapp-lid:' || substring(address FROM '^[0-9]+');
        END IF;
        address := regexp_replace(address, '^whatsapp:|(:[0-9]+)?@(s\.whatsapp\.net|c\.us)$', '', 'g');
        address := regexp_replace(address, '[\s().-]', '', 'g');
        IF address ~ '^\+?[1-9][0-9]{6,14}$' THEN
            RETURN 'whatsapp:+' || ltrim(address, '+');
        END IF;
    ELSIF p_channel = 'email' THEN
        address := lower(regexp_replace(address, '^email:', ''));
        IF address ~ '^[^@\s<>]+@[^@\s<>]+$' THEN
            RETURN 'email:' || address;
        END IF;
    ELSIF p_channel = 'telegram' THEN
        address := regexp_replace(address, '^telegram:', '');
        IF address ~ '^-?[0-9]+$' THEN
            RETURN 'telegram:' || address;
        END IF;
    ELSIF address <> '' THEN
        RETURN CASE WHEN starts_with(address, p_channel || ':') THEN address ELSE p_channel || ':' || address END;
    END IF;
    RAISE EXCEPTION 'recipient % is not an address on %', quote_nullable(p_address), p_channel
        USING ERRCODE = 'invalid_parameter_value',
              HINT = CASE p_channel
                  WHEN 'whatsapp' THEN 'Give the number with its country code, as in +60123456789, or a group as <id>@g.us.'
                  WHEN 'email' THEN 'Give an address such as john@example.com.'
                  WHEN 'telegram' THEN 'Give the numeric chat id, as in telegram:123456789.'
                  ELSE 'Give a recipient.' END;
END
$$;

-- What the queue shows as recipient: '+60123456789', 'john@example.com', 'telegram:123', a group's jid.
-- This and the next have no search_path of their own, so that they are inlined; every name in them says its schema.
CREATE OR REPLACE FUNCTION et_address(p_external_id TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE AS $$
    SELECT pg_catalog.regexp_replace(p_external_id, '^(whatsapp|whatsapp-group|email):', '')
$$;
ALTER FUNCTION et_address(TEXT) RESET ALL;

CREATE OR REPLACE FUNCTION et_lead_kind(p_external_id TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_external_id OPERATOR(pg_catalog.~) '^([a-z0-9_]+-group:|telegram:-)' THEN 'group' ELSE 'person' END
$$;
ALTER FUNCTION et_lead_kind(TEXT) RESET ALL;

-- The workspace a session gives to new leads; one that does not exist in the tenant becomes NULL with a warning.
CREATE OR REPLACE FUNCTION et_default_workspace(p_tenant_id BIGINT, p_channel_session_id BIGINT) RETURNS BIGINT
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    named TEXT;
    found_id BIGINT;
BEGIN
    SELECT s.metadata ->> 'default_workspace_id' INTO named
    FROM public.et_channel_sessions s
    WHERE s.tenant_id = p_tenant_id AND s.id = p_channel_session_id;
    IF named IS NULL THEN
        RETURN NULL;
    END IF;
    IF named ~ '^[0-9]{1,18}$' THEN
        SELECT w.id INTO found_id
        FROM public.et_workspaces w
        WHERE w.tenant_id = p_tenant_id AND w.id = named::BIGINT;
    END IF;
    IF found_id IS NULL THEN
        RAISE WARNING 'default_workspace_id % of session % does not exist in tenant %: the lead gets none',
                      named, p_channel_session_id, p_tenant_id;
    END IF;
    RETURN found_id;
END
$$;

-- The lead behind an external id, made when nobody has it. Two callers at the same instant get the same lead.
-- Internal: callers have checked the tenant.
CREATE OR REPLACE FUNCTION et_find_or_create_lead(
    p_tenant_id BIGINT, p_external_id TEXT, p_channel_session_id BIGINT, p_name TEXT DEFAULT NULL
) RETURNS BIGINT
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    lead BIGINT;
BEGIN
    FOR attempt IN 1..5 LOOP
        SELECT i.lead_id INTO lead
        FROM public.et_lead_identities i
        WHERE i.tenant_id = p_tenant_id AND i.external_id = p_external_id;
        IF FOUND THEN
            RETURN lead;
        END IF;
        BEGIN
            INSERT INTO public.et_leads AS l (tenant_id, workspace_id, external_id, kind, name)
            VALUES (p_tenant_id, public.et_default_workspace(p_tenant_id, p_channel_session_id), p_external_id,
                    public.et_lead_kind(p_external_id), p_name)
            ON CONFLICT (tenant_id, external_id) DO NOTHING
            RETURNING l.id INTO lead;
            IF FOUND THEN
                RETURN lead;
            END IF;
        EXCEPTION WHEN unique_violation THEN
            NULL;  -- its identity went to another lead meanwhile: look again
        END;
    END LOOP;
    RAISE EXCEPTION 'no lead could be found or created for this recipient'
        USING ERRCODE = 'serialization_failure', HINT = 'Run the transaction again.';
END
$$;

-- The lane of a queue row: 2 a reply (an agent's, a person's, or to somebody who wrote within the last hour), 1 to somebody
-- who has written to this session before, 0 to a stranger. The origins are those of core/store/dispatching.py.
CREATE OR REPLACE FUNCTION et_lane(
    p_tenant BIGINT, p_session BIGINT, p_lead BIGINT, p_thread BIGINT, p_dedupe TEXT, p_origin TEXT
) RETURNS SMALLINT
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF p_dedupe LIKE 'reply:%' OR p_origin = ANY (
        '{agent,auto,worker,rules,llm,inbound_worker,person,operator,console,human,phone}')
    THEN
        RETURN 2;
    END IF;
    PERFORM 1
    FROM public.et_messages i
    WHERE i.thread_id = p_thread
      AND i.occurred_at > now() - INTERVAL '1 hour'
      AND i.direction = 'inbound'
    LIMIT 1;
    IF FOUND THEN
        RETURN 2;
    END IF;
    PERFORM 1
    FROM public.et_messages i
    WHERE i.tenant_id = p_tenant
      AND i.channel_session_id = p_session
      AND i.lead_id = p_lead
      AND i.direction = 'inbound'
    LIMIT 1;
    RETURN FOUND::INTEGER;
END
$$;

-- The two rows of an outbound message, and its lead when nobody has the address. Internal: callers have checked the tenant
-- and say which lead and thread, where there are any; what they say spares the triggers that would look it up.
CREATE OR REPLACE FUNCTION et_put_outbound(
    p_tenant BIGINT, p_session BIGINT, p_channel TEXT, p_sender TEXT, p_lead BIGINT, p_thread BIGINT, p_external TEXT,
    p_recipient TEXT, p_type TEXT, p_content TEXT, p_media_url TEXT, p_reply_to TEXT, p_raw JSONB, p_role TEXT, p_llm JSONB,
    p_dedupe TEXT, p_priority INTEGER, p_at TIMESTAMPTZ, p_expires_in INTERVAL,
    OUT message_id BIGINT, OUT queue_id BIGINT, OUT thread_id BIGINT
)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    lead CONSTANT BIGINT := coalesce(p_lead, public.et_find_or_create_lead(p_tenant, p_external, p_session));
BEGIN
    INSERT INTO public.et_messages AS m
        (tenant_id, lead_id, thread_id, channel_session_id, channel, direction, role, sender_identifier, chat_identifier,
         message_type, content, reply_to_message_id, media_url, raw_payload, delivery_status, occurred_at,
         llm_provider, llm_model, llm_prompt_tokens, llm_completion_tokens, llm_total_tokens, llm_estimated_cost_usd)
    VALUES
        (p_tenant, lead, p_thread, p_session, p_channel, 'outbound', p_role, p_sender,
         CASE WHEN public.et_lead_kind(coalesce(p_external, '')) = 'group' THEN public.et_address(p_external) END,
         p_type, p_content, p_reply_to, p_media_url, p_raw, 'queued', now(),
         p_llm ->> 'provider', p_llm ->> 'model', (p_llm ->> 'prompt_tokens')::INTEGER,
         (p_llm ->> 'completion_tokens')::INTEGER, (p_llm ->> 'total_tokens')::INTEGER,
         (p_llm ->> 'estimated_cost_usd')::NUMERIC)
    RETURNING m.id, m.thread_id INTO message_id, thread_id;

    INSERT INTO public.et_outbound_queue AS q
        (tenant_id, message_id, thread_id, lane, channel, channel_session_id, recipient, priority, send_at,
         next_attempt_at, expires_at, dedupe_key)
    VALUES
        (p_tenant, message_id, thread_id,
         public.et_lane(p_tenant, p_session, lead, thread_id, p_dedupe, p_raw ->> 'origin'),
         p_channel, p_session, p_recipient, p_priority, p_at, greatest(p_at, now()),
         greatest(p_at, now()) + p_expires_in, p_dedupe)
    RETURNING q.id INTO queue_id;
END
$$;

-- One outbound message: lead and thread when needed, the message, the queue row, in the caller's transaction.
-- The first seven arguments are the published ones. A repeated dedupe_key returns the first call's ids, also when the
-- first call is still running. lead_id may stand in for recipient: the address is then chosen when it is sent.
-- llm: {provider, model, prompt_tokens, completion_tokens, total_tokens, estimated_cost_usd}.
CREATE OR REPLACE FUNCTION et_enqueue_outbound(
    tenant_id           BIGINT,
    channel_session_id  BIGINT,
    recipient           TEXT,
    content             TEXT,
    message_type        TEXT DEFAULT 'text',
    media_url           TEXT DEFAULT NULL,
    dedupe_key          TEXT DEFAULT NULL,
    payload             JSONB DEFAULT NULL,
    send_at             TIMESTAMPTZ DEFAULT NULL,
    priority            INTEGER DEFAULT 0,
    expires_in          INTERVAL DEFAULT INTERVAL '24 hours',
    reply_to_message_id TEXT DEFAULT NULL,
    raw_payload         JSONB DEFAULT NULL,
    lead_id             BIGINT DEFAULT NULL,
    role                TEXT DEFAULT 'assistant',
    llm                 JSONB DEFAULT NULL,
    OUT message_id      BIGINT,
    OUT queue_id        BIGINT,
    OUT thread_id       BIGINT
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
<<fn>>
DECLARE
    p_tenant   CONSTANT BIGINT := et_enqueue_outbound.tenant_id;
    p_session  CONSTANT BIGINT := et_enqueue_outbound.channel_session_id;
    p_dedupe   CONSTANT TEXT := nullif(et_enqueue_outbound.dedupe_key, '');
    p_type     CONSTANT TEXT := coalesce(et_enqueue_outbound.message_type, 'text');
    p_at       CONSTANT TIMESTAMPTZ := coalesce(et_enqueue_outbound.send_at, now());
    p_role     CONSTANT TEXT := coalesce(et_enqueue_outbound.role, 'assistant');
    p_priority CONSTANT INTEGER := coalesce(et_enqueue_outbound.priority, 0);
    p_life     CONSTANT INTERVAL := coalesce(et_enqueue_outbound.expires_in, INTERVAL '24 hours');
    raw        CONSTANT JSONB := coalesce(et_enqueue_outbound.raw_payload, '{}')
        || CASE WHEN et_enqueue_outbound.payload IS NULL THEN '{}'
                ELSE jsonb_build_object('payload', et_enqueue_outbound.payload) END;
    tenant_status TEXT;
    channel    TEXT;
    address    TEXT;
    external   TEXT;
    lead       BIGINT;
    thread     BIGINT;
    sent_to    TEXT;
    put        RECORD;
    problem    TEXT;
BEGIN
    IF current_setting('role', true) IS DISTINCT FROM 'et_worker' AND NOT coalesce(public.et_may_act(p_tenant), false) THEN
        RAISE EXCEPTION '% may not send for tenant %', session_user, p_tenant
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'An administrator names the tenant of a database login in et_db_roles.';
    END IF;
    SELECT t.status, s.channel_type, s.session_identifier INTO tenant_status, fn.channel, fn.address
    FROM public.et_tenants t
    LEFT JOIN public.et_channel_sessions s ON s.tenant_id = t.id AND s.id = p_session
    WHERE t.id = p_tenant;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'tenant % does not exist', p_tenant USING ERRCODE = 'foreign_key_violation';
    ELSIF tenant_status <> 'active' THEN
        RAISE EXCEPTION 'tenant % is %: nothing is sent', p_tenant, tenant_status
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Set its status to active first.';
    END IF;

    IF p_dedupe IS NOT NULL THEN
        SELECT q.message_id, q.id, q.thread_id INTO et_enqueue_outbound.message_id, et_enqueue_outbound.queue_id, et_enqueue_outbound.thread_id
        FROM public.et_outbound_queue q
        WHERE q.tenant_id = p_tenant AND q.dedupe_key = p_dedupe;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;

    IF fn.channel IS NULL THEN
        RAISE EXCEPTION 'session % does not exist in tenant %', p_session, p_tenant
            USING ERRCODE = 'foreign_key_violation', HINT = 'Look for its id in et_channel_sessions.';
    END IF;

    problem := CASE
        WHEN p_type NOT IN ('text', 'image', 'video', 'audio', 'document', 'sticker', 'location', 'contact', 'poll',
                            'reaction', 'edited', 'deleted')
            THEN format('message_type %L cannot be sent', p_type)
        WHEN p_type IN ('text', 'edited') AND btrim(coalesce(et_enqueue_outbound.content, '')) = ''
             AND nullif(et_enqueue_outbound.payload ->> 'html', '') IS NULL
            THEN format('content is empty, a message of type %s needs text', p_type)
        WHEN p_type IN ('image', 'video', 'audio', 'document', 'sticker')
             AND coalesce(et_enqueue_outbound.media_url, '') = ''
            THEN format('media_url is empty, a message of type %s needs a file', p_type)
        WHEN p_type IN ('location', 'contact', 'poll') AND et_enqueue_outbound.payload IS NULL
            THEN format('payload is empty, a message of type %s needs it', p_type)
        WHEN p_type IN ('reaction', 'edited', 'deleted') AND coalesce(et_enqueue_outbound.reply_to_message_id, '') = ''
            THEN format('reply_to_message_id is empty, a message of type %s needs the message it is about', p_type)
        WHEN p_priority NOT BETWEEN -32768 AND 32767
            THEN 'priority must lie between -32768 and 32767'
        WHEN p_life <= INTERVAL '0'
            THEN 'expires_in must be positive'
    END;
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = 'invalid_parameter_value';
    END IF;

    IF btrim(coalesce(et_enqueue_outbound.recipient, '')) <> '' THEN
        external := public.et_external_id(fn.channel, et_enqueue_outbound.recipient);
        sent_to := public.et_address(external);
        SELECT i.lead_id, t.id INTO fn.lead, fn.thread
        FROM public.et_lead_identities i
        LEFT JOIN public.et_threads t ON t.tenant_id = i.tenant_id
                                     AND t.lead_id = i.lead_id
                                     AND t.channel_session_id = p_session
                                     AND t.status = 'active'
        WHERE i.tenant_id = p_tenant AND i.external_id = fn.external;
    ELSE
        SELECT l.id, CASE WHEN l.kind = 'group' THEN l.external_id END INTO fn.lead, fn.external
        FROM public.et_leads l
        WHERE l.tenant_id = p_tenant AND l.id = et_enqueue_outbound.lead_id;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'recipient is empty and lead % does not exist in tenant %',
                            coalesce(et_enqueue_outbound.lead_id::TEXT, 'NULL'), p_tenant
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Give a recipient or a lead_id.';
        END IF;
    END IF;

    -- Only a dedupe_key needs the block, which undoes both rows when somebody else's row with the same key wins.
    IF p_dedupe IS NULL THEN
        SELECT * INTO put
        FROM public.et_put_outbound(
            p_tenant, p_session, fn.channel, fn.address, fn.lead, fn.thread, fn.external, sent_to, p_type,
            et_enqueue_outbound.content, et_enqueue_outbound.media_url, et_enqueue_outbound.reply_to_message_id, raw, p_role, llm,
            p_dedupe, p_priority, p_at, p_life);
    ELSE
        BEGIN
            SELECT * INTO put
            FROM public.et_put_outbound(
                p_tenant, p_session, fn.channel, fn.address, fn.lead, fn.thread, fn.external, sent_to, p_type,
                et_enqueue_outbound.content, et_enqueue_outbound.media_url, et_enqueue_outbound.reply_to_message_id, raw, p_role, llm,
                p_dedupe, p_priority, p_at, p_life);
        EXCEPTION WHEN unique_violation THEN
            SELECT q.message_id, q.id AS queue_id, q.thread_id INTO put
            FROM public.et_outbound_queue q
            WHERE q.tenant_id = p_tenant AND q.dedupe_key = p_dedupe;
            IF NOT FOUND THEN
                RAISE;
            END IF;
        END;
    END IF;
    et_enqueue_outbound.message_id := put.message_id;
    et_enqueue_outbound.queue_id := put.queue_id;
    et_enqueue_outbound.thread_id := put.thread_id;
END
$$;

-- An operator sends a failed or unknown item again. The only way back to 'queued'.
-- A channel's id learned for the earlier try is put aside: the new try gets its own.
CREATE OR REPLACE FUNCTION et_retry_outbound(queue_id BIGINT) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    item RECORD;
BEGIN
    SELECT q.id, q.tenant_id, q.message_id, q.status, t.status AS tenant_status INTO item
    FROM public.et_outbound_queue q
    JOIN public.et_tenants t ON t.id = q.tenant_id
    WHERE q.id = et_retry_outbound.queue_id
    FOR UPDATE OF q;
    -- Somebody else's item does not exist, as far as this caller can tell.
    IF NOT FOUND OR NOT coalesce(public.et_may_act(item.tenant_id), false) THEN
        RAISE EXCEPTION 'outbound queue item % does not exist', et_retry_outbound.queue_id USING ERRCODE = 'no_data_found';
    ELSIF item.tenant_status <> 'active' THEN
        RAISE EXCEPTION 'tenant % is %: nothing is sent', item.tenant_id, item.tenant_status
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Set its status to active first.';
    ELSIF item.status NOT IN ('failed', 'unknown') THEN
        RAISE EXCEPTION 'outbound queue item % is %: only a failed or unknown one can be sent again', item.id, item.status
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE public.et_messages m
    SET delivery_status = 'queued',
        channel_message_id = CASE WHEN m.channel_message_id LIKE 'out\_%' THEN m.channel_message_id
                                  ELSE 'out_' || gen_random_uuid() END,
        raw_payload = CASE WHEN m.channel_message_id LIKE 'out\_%' THEN m.raw_payload
                           ELSE m.raw_payload || jsonb_build_object('earlier_channel_message_ids',
                               coalesce(m.raw_payload -> 'earlier_channel_message_ids', '[]')
                               || to_jsonb(m.channel_message_id)) END
    WHERE m.id = item.message_id;
    UPDATE public.et_outbound_queue q
    SET status = 'queued', retry_count = 0, next_attempt_at = greatest(now(), q.send_at),
        expires_at = greatest(now(), q.send_at) + INTERVAL '24 hours',
        claimed_by = NULL, claimed_at = NULL, error_code = NULL, last_error = NULL
    WHERE q.id = item.id;
END
$$;
