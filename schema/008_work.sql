-- What workers call: claims of inbound messages, receipts that come in any order.

-- Takes up to p_limit threads with waiting messages and claims what waits in them (at most 50 a thread, so that messages
-- written in one breath are answered together). Two workers never hold one thread: the second finds its advisory lock
-- taken and goes on to the next. Not the thread's row, which ingest and people write to: skipping it for their sake would
-- leave a message to the next poll. A thread with a claim that is still running waits for it to end; suspended tenants
-- wait. Returned in order of thread and message.
CREATE OR REPLACE FUNCTION et_claim_inbound(p_owner TEXT, p_limit INTEGER DEFAULT 20, p_lease INTERVAL DEFAULT INTERVAL '2 minutes')
RETURNS SETOF et_messages
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    candidate BIGINT;
    threads BIGINT[] := '{}';
    ids BIGINT[];
BEGIN
    FOR candidate IN
        -- The oldest waiting first. More than p_limit, because some will be taken.
        SELECT waiting.thread_id
        FROM (
            SELECT m.thread_id, m.id
            FROM public.et_messages m
            JOIN public.et_tenants n ON n.id = m.tenant_id AND n.status = 'active'
            WHERE m.inbound_work = 1 AND m.id > 0
              AND NOT EXISTS (SELECT 1 FROM public.et_inbound_claims c WHERE c.thread_id = m.thread_id)
            ORDER BY m.id
            LIMIT p_limit * 10
        ) waiting
        GROUP BY waiting.thread_id
        ORDER BY min(waiting.id)
    LOOP
        IF pg_try_advisory_xact_lock(hashtextextended('et_thread:' || candidate, 0)) THEN
            threads := threads || candidate;
        END IF;
        EXIT WHEN cardinality(threads) >= p_limit;
    END LOOP;
    IF threads = '{}' THEN
        RETURN;
    END IF;
    -- A fresh statement: whoever held a thread until a moment ago has committed, and its claims can be seen.
    SELECT array_agg(waiting.id ORDER BY waiting.id) INTO ids
    FROM (
        SELECT m.id, row_number() OVER (PARTITION BY m.thread_id ORDER BY m.id) AS n
        FROM public.et_messages m
        WHERE m.thread_id = ANY (threads)
          AND m.inbound_work = 1 AND m.thread_id > 0
          AND NOT EXISTS (SELECT 1 FROM public.et_inbound_claims c WHERE c.thread_id = m.thread_id)
    ) waiting
    WHERE waiting.n <= 50;
    IF ids IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO public.et_inbound_claims (message_id, tenant_id, thread_id, owner, expires_at)
    SELECT m.id, m.tenant_id, m.thread_id, p_owner, clock_timestamp() + p_lease
    FROM public.et_messages m
    WHERE m.id = ANY (ids);
    UPDATE public.et_messages m SET delivery_status = 'inbound_processing' WHERE m.id = ANY (ids);
    RETURN QUERY
        SELECT m.* FROM public.et_messages m WHERE m.id = ANY (ids) ORDER BY m.thread_id, m.id;
END
$$;

-- A worker that is still at it says so. Answers how many claims it holds.
CREATE OR REPLACE FUNCTION et_renew_inbound(p_owner TEXT, p_lease INTERVAL DEFAULT INTERVAL '2 minutes') RETURNS INTEGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    held INTEGER;
BEGIN
    UPDATE public.et_inbound_claims c SET expires_at = clock_timestamp() + p_lease WHERE c.owner = p_owner;
    GET DIAGNOSTICS held = ROW_COUNT;
    RETURN held;
END
$$;

-- Gives messages back to 'received'. Without an owner: those whose claim has run out, or is gone. With one: that owner's
-- claims, for a worker that stops in good order or was found dead. The only way back; answers how many.
CREATE OR REPLACE FUNCTION et_release_inbound(p_owner TEXT DEFAULT NULL) RETURNS INTEGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    ids BIGINT[];
BEGIN
    SELECT array_agg(waiting.id) INTO ids
    FROM (
        SELECT m.id
        FROM public.et_messages m
        LEFT JOIN public.et_inbound_claims c ON c.message_id = m.id
        WHERE m.inbound_work = 2
          AND CASE WHEN p_owner IS NULL THEN c.message_id IS NULL OR c.expires_at < clock_timestamp()
                   ELSE c.owner = p_owner END
        ORDER BY m.id
        LIMIT 1000
        FOR UPDATE OF m SKIP LOCKED
    ) waiting;
    IF ids IS NULL THEN
        RETURN 0;
    END IF;
    UPDATE public.et_messages m SET delivery_status = 'received' WHERE m.id = ANY (ids);
    RETURN cardinality(ids);
END
$$;

-- A receipt: moves the message as far as it says ('sent' → 'delivered' → 'read', step by step), with its queue row.
-- For an id that no message has (yet) the receipt is parked. Answers what became of it:
-- 'applied', 'late' (the message was already there or further), 'parked'.
CREATE OR REPLACE FUNCTION et_apply_receipt(
    p_tenant_id BIGINT, p_channel_session_id BIGINT, p_channel_message_id TEXT, p_status TEXT,
    p_occurred_at TIMESTAMPTZ DEFAULT now(), p_lead_id BIGINT DEFAULT NULL, p_park BOOLEAN DEFAULT true
) RETURNS TEXT
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    msg RECORD;
    outcome TEXT := NULL;
    steps TEXT[];
    step TEXT;
BEGIN
    IF p_status NOT IN ('sent', 'delivered', 'read', 'failed') THEN
        RAISE EXCEPTION 'a receipt cannot say %', quote_nullable(p_status) USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR msg IN
        SELECT m.id, m.delivery_status
        FROM public.et_messages m
        WHERE m.tenant_id = p_tenant_id
          AND m.channel_session_id = p_channel_session_id
          AND m.channel_message_id = p_channel_message_id
          AND m.direction = 'outbound'
          AND (p_lead_id IS NULL OR m.lead_id = p_lead_id)
        ORDER BY m.id
        FOR NO KEY UPDATE
    LOOP
        IF msg.delivery_status IN ('queued', 'dispatching') THEN
            CONTINUE;  -- the send has not committed its outcome: park
        END IF;
        steps := CASE
            WHEN p_status = 'failed' AND msg.delivery_status IN ('sent', 'delivered', 'unknown') THEN ARRAY['failed']
            WHEN msg.delivery_status = 'unknown' THEN ARRAY[p_status]
            WHEN msg.delivery_status = 'sent' AND p_status = 'delivered' THEN ARRAY['delivered']
            WHEN msg.delivery_status = 'sent' AND p_status = 'read' THEN ARRAY['delivered', 'read']
            WHEN msg.delivery_status = 'delivered' AND p_status = 'read' THEN ARRAY['read']
            ELSE '{}'
        END;
        FOREACH step IN ARRAY steps LOOP
            UPDATE public.et_messages m SET delivery_status = step WHERE m.id = msg.id;
        END LOOP;
        outcome := CASE WHEN steps = '{}' THEN coalesce(outcome, 'late') ELSE 'applied' END;
    END LOOP;
    IF outcome IS NULL AND p_park THEN
        INSERT INTO public.et_parked_receipts (tenant_id, channel_session_id, channel_message_id, status, occurred_at)
        VALUES (p_tenant_id, p_channel_session_id, p_channel_message_id, p_status, coalesce(p_occurred_at, now()))
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN coalesce(outcome, 'parked');
END
$$;

-- Applies the parked receipts whose message is there by now and forgets those older than a day. Run it after marking
-- sends and now and then: a receipt and a send that commit at the same instant do not see each other.
CREATE OR REPLACE FUNCTION et_apply_parked_receipts() RETURNS INTEGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    parked RECORD;
    applied INTEGER := 0;
BEGIN
    FOR parked IN
        SELECT p.*
        FROM public.et_parked_receipts p
        WHERE EXISTS (
            SELECT 1 FROM public.et_messages m
            WHERE m.channel_session_id = p.channel_session_id AND m.channel_message_id = p.channel_message_id
              AND m.tenant_id = p.tenant_id AND m.direction = 'outbound'
              AND m.delivery_status NOT IN ('queued', 'dispatching')
        )
        ORDER BY array_position(ARRAY['sent', 'delivered', 'read', 'failed'], p.status), p.occurred_at
        LIMIT 1000
        FOR UPDATE SKIP LOCKED
    LOOP
        PERFORM public.et_apply_receipt(parked.tenant_id, parked.channel_session_id, parked.channel_message_id,
                                        parked.status, parked.occurred_at, NULL, false);
        DELETE FROM public.et_parked_receipts p
        WHERE p.tenant_id = parked.tenant_id AND p.channel_session_id = parked.channel_session_id
          AND p.channel_message_id = parked.channel_message_id AND p.status = parked.status;
        applied := applied + 1;
    END LOOP;
    DELETE FROM public.et_parked_receipts p WHERE p.parked_at < now() - INTERVAL '1 day';
    RETURN applied;
END
$$;
