-- Statuses move along the published graph only, whoever writes, and a queue row and its message move together.

-- True while the named function is running. It cannot be forged by a setting, and a plain UPDATE has no such caller.
CREATE OR REPLACE FUNCTION et_called_from(signature TEXT) RETURNS BOOLEAN
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    stack TEXT;
BEGIN
    GET DIAGNOSTICS stack = PG_CONTEXT;
    RETURN position(' public.' || signature || ' ' IN stack) > 0;
END
$$;

CREATE OR REPLACE FUNCTION et_message_before_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was CONSTANT TEXT := OLD.delivery_status;
    becomes CONSTANT TEXT := NEW.delivery_status;
BEGIN
    NEW.updated_at := now();
    IF was = becomes THEN
        RETURN NEW;
    END IF;
    -- Receipts come in any order: a late one changes nothing.
    IF was = 'read' AND becomes = 'delivered' THEN
        NEW.delivery_status := was;
        RETURN NEW;
    END IF;
    IF (CASE was
        WHEN 'received' THEN becomes = 'inbound_processing'
        WHEN 'inbound_processing' THEN
            becomes IN ('inbound_ai_replied', 'inbound_follow_up', 'inbound_human_takeover', 'inbound_ignored', 'inbound_error')
            OR (becomes = 'received' AND public.et_called_from('et_release_inbound(text)'))
        WHEN 'queued' THEN becomes IN ('dispatching', 'cancelled', 'failed')
        WHEN 'dispatching' THEN becomes IN ('sent', 'queued', 'failed', 'unknown')
        WHEN 'sent' THEN becomes IN ('delivered', 'failed')
        WHEN 'delivered' THEN becomes IN ('read', 'failed')
        WHEN 'unknown' THEN
            becomes IN ('sent', 'delivered', 'read', 'failed')
            OR (becomes = 'queued' AND public.et_called_from('et_retry_outbound(bigint)'))
        WHEN 'failed' THEN becomes = 'queued' AND public.et_called_from('et_retry_outbound(bigint)')
        ELSE false
    END) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'message %: delivery_status cannot go from % to %', OLD.id, was, becomes
        USING ERRCODE = 'check_violation', CONSTRAINT = 'et_messages_delivery_status_graph', TABLE = 'et_messages',
              HINT = CASE WHEN becomes = 'queued' THEN 'Use et_retry_outbound(queue_id).'
                          WHEN becomes = 'received' THEN 'Use et_release_inbound(owner).'
                          ELSE 'Statuses only move forward.' END;
END
$$;

-- A call of a row trigger is the dearest step of moving a row. A writer that says the time itself and moves along the ways
-- a send takes is spared it; whoever else writes, and whatever else is written, goes through it.
CREATE OR REPLACE TRIGGER et_messages_before_update
    BEFORE UPDATE ON et_messages
    FOR EACH ROW
    WHEN (NEW.updated_at <= OLD.updated_at
        OR NOT (OLD.delivery_status = 'queued' AND NEW.delivery_status = 'dispatching'
            OR OLD.delivery_status = 'dispatching' AND NEW.delivery_status IN ('sent', 'queued', 'failed', 'unknown')))
    EXECUTE FUNCTION et_message_before_update();

CREATE OR REPLACE FUNCTION et_queue_before_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was CONSTANT TEXT := OLD.status;
    becomes CONSTANT TEXT := NEW.status;
BEGIN
    NEW.updated_at := now();
    IF was = becomes OR (CASE was
        WHEN 'queued' THEN becomes IN ('dispatching', 'cancelled', 'failed')
        WHEN 'dispatching' THEN becomes IN ('sent', 'queued', 'failed', 'unknown')
        WHEN 'sent' THEN becomes = 'failed'
        WHEN 'unknown' THEN
            becomes IN ('sent', 'failed')
            OR (becomes = 'queued' AND public.et_called_from('et_retry_outbound(bigint)'))
        WHEN 'failed' THEN becomes = 'queued' AND public.et_called_from('et_retry_outbound(bigint)')
        ELSE false
    END) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'outbound queue item %: status cannot go from % to %', OLD.id, was, becomes
        USING ERRCODE = 'check_violation', CONSTRAINT = 'et_outbound_queue_status_graph', TABLE = 'et_outbound_queue',
              HINT = CASE WHEN becomes = 'queued' THEN 'Use et_retry_outbound(queue_id).' ELSE 'Statuses only move forward.' END;
END
$$;

CREATE OR REPLACE TRIGGER et_outbound_queue_before_update
    BEFORE UPDATE ON et_outbound_queue
    FOR EACH ROW
    WHEN (NEW.updated_at <= OLD.updated_at
        OR NOT (OLD.status = 'queued' AND NEW.status = 'dispatching'
            OR OLD.status = 'dispatching' AND NEW.status IN ('sent', 'queued', 'failed', 'unknown')))
    EXECUTE FUNCTION et_queue_before_update();

-- Whether the statement that runs moves queue rows and messages together by itself and writes the events. Only the worker
-- is believed: everybody else's writes are followed up by the two triggers below.
CREATE OR REPLACE FUNCTION et_moves_together() RETURNS BOOLEAN
LANGUAGE sql STABLE AS $$
    SELECT pg_catalog.current_setting('gateway.together', true) = 'on' AND pg_catalog.current_setting('role', true) = 'et_worker'
$$;

-- After a statement that moved queue rows: their messages follow, and rows that came back wake the workers (moving
-- next_attempt_at of a waiting one must not wake whoever moved it). One pass over what changed. Both transition tables
-- hold the whole statement, so a nested loop over them would be quadratic, and a plan cached while a statement had one
-- row would keep it: hence enable_nestloop. The UPDATE has one plan, by index, whatever the size.
CREATE OR REPLACE FUNCTION et_queue_after_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_nestloop = off AS $$
DECLARE
    moved RECORD;
BEGIN
    IF public.et_moves_together() THEN
        RETURN NULL;
    END IF;
    FOR moved IN
        SELECT n.status, array_agg(n.message_id ORDER BY n.message_id) AS ids
        FROM new_rows n
        JOIN old_rows o ON o.id = n.id
        WHERE o.status <> n.status
        GROUP BY n.status
    LOOP
        UPDATE public.et_messages m
        SET delivery_status = moved.status, updated_at = now()
        WHERE m.id = ANY (moved.ids)
          AND m.delivery_status <> moved.status
          AND NOT (moved.status = 'sent' AND m.delivery_status IN ('delivered', 'read'));
        IF moved.status = 'queued' THEN
            PERFORM pg_notify('et_outbound', '');
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER et_outbound_queue_after_update
    AFTER UPDATE ON et_outbound_queue REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_queue_after_update();

-- After a statement that moved messages: the event of each, the queue rows and claims behind them, a wake-up for inbound
-- messages that can be worked on (again): given back by a dead worker, or a placeholder that can be read now.
CREATE OR REPLACE FUNCTION et_message_after_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_nestloop = off AS $$
DECLARE
    moved RECORD;
    news BOOLEAN := false;
BEGIN
    IF public.et_moves_together() THEN
        RETURN NULL;
    END IF;
    FOR moved IN
        SELECT n.delivery_status AS status, n.direction,
               array_agg(n.id ORDER BY n.id) FILTER (WHERE o.delivery_status <> n.delivery_status) AS ids,
               array_agg(n.tenant_id ORDER BY n.id) FILTER (WHERE o.delivery_status <> n.delivery_status) AS tenants,
               bool_or(n.delivery_status = 'received' AND NOT n.is_history AND NOT n.placeholder) AS workable
        FROM new_rows n
        JOIN old_rows o ON o.id = n.id
        WHERE o.delivery_status <> n.delivery_status
           OR (o.placeholder AND NOT n.placeholder)
        GROUP BY n.delivery_status, n.direction
    LOOP
        IF moved.ids IS NOT NULL THEN
            INSERT INTO public.et_events (tenant_id, kind, ref_id)
            SELECT e.tenant_id, 'status', e.id
            FROM unnest(moved.tenants, moved.ids) AS e (tenant_id, id);
            news := true;
            IF moved.direction = 'outbound' THEN
                UPDATE public.et_outbound_queue q
                SET status = CASE WHEN moved.status IN ('delivered', 'read') THEN 'sent' ELSE moved.status END
                WHERE q.message_id = ANY (moved.ids)
                  AND q.status <> CASE WHEN moved.status IN ('delivered', 'read') THEN 'sent' ELSE moved.status END;
            ELSIF moved.status <> 'inbound_processing' THEN
                DELETE FROM public.et_inbound_claims c
                WHERE c.message_id = ANY (moved.ids);
            END IF;
        END IF;
        IF moved.workable THEN
            PERFORM pg_notify('et_inbound', '');
        END IF;
    END LOOP;
    IF news THEN
        PERFORM pg_notify('et_events', '');
    END IF;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER et_messages_after_update
    AFTER UPDATE ON et_messages REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_message_after_update();

-- A queue row belongs to an outbound message that waits; what the message knows need not be said twice.
CREATE OR REPLACE FUNCTION et_queue_before_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    msg RECORD;
BEGIN
    SELECT m.tenant_id, m.lead_id, m.thread_id, m.channel, m.channel_session_id, m.direction, m.delivery_status,
           coalesce(m.raw_payload ->> 'origin', '') AS origin
    INTO msg
    FROM public.et_messages m
    WHERE m.id = NEW.message_id AND m.tenant_id = coalesce(NEW.tenant_id, m.tenant_id);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'message % does not exist in this tenant', NEW.message_id
            USING ERRCODE = 'foreign_key_violation', TABLE = 'et_outbound_queue',
                  HINT = 'Insert the et_messages row first, in the same transaction.';
    END IF;
    NEW.tenant_id := msg.tenant_id;
    NEW.thread_id := msg.thread_id;
    NEW.channel := coalesce(NEW.channel, msg.channel);
    NEW.channel_session_id := coalesce(NEW.channel_session_id, msg.channel_session_id);
    IF NEW.channel <> msg.channel OR NEW.channel_session_id <> msg.channel_session_id THEN
        RAISE EXCEPTION 'queue row and message % name different sessions', NEW.message_id
            USING ERRCODE = 'check_violation', TABLE = 'et_outbound_queue',
                  HINT = 'Leave channel and channel_session_id out: they are taken from the message.';
    END IF;
    IF msg.direction <> 'outbound' OR msg.delivery_status <> NEW.status OR NEW.status <> 'queued' THEN
        RAISE EXCEPTION 'message % is % %, only an outbound message that is queued can be put into the queue',
                        NEW.message_id, msg.direction, msg.delivery_status
            USING ERRCODE = 'check_violation', TABLE = 'et_outbound_queue';
    END IF;
    NEW.next_attempt_at := greatest(NEW.next_attempt_at, NEW.send_at);
    -- The default life of a day counts from the moment the item may go out.
    IF NEW.send_at > now() AND NEW.expires_at = now() + INTERVAL '24 hours' THEN
        NEW.expires_at := NEW.send_at + INTERVAL '24 hours';
    END IF;

    NEW.lane := public.et_lane(NEW.tenant_id, NEW.channel_session_id, msg.lead_id, NEW.thread_id, NEW.dedupe_key, msg.origin);
    RETURN NEW;
END
$$;

-- et_enqueue_outbound has looked all that up. A backend's login may not name the thread; the API's role may, and is not
-- believed.
CREATE OR REPLACE TRIGGER et_outbound_queue_before_insert
    BEFORE INSERT ON et_outbound_queue
    FOR EACH ROW
    WHEN (NEW.thread_id IS NULL OR current_setting('role', true) = 'et_api')
    EXECUTE FUNCTION et_queue_before_insert();
