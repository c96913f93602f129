-- The latest message of a thread, wake-ups, the event log. A notification carries nothing and is only a hint; it is sent
-- once per statement and only when rows were written: statement triggers also fire when DO NOTHING stored nothing.
-- Transition tables allow one event per trigger, so INSERT and UPDATE have one each.

-- A database that has just been born has no statistics, and autovacuum looks once a minute. Until then plans are made for
-- empty tables and kept by every long connection, those of foreign keys too: each new message then reads all threads of
-- its tenant, because any index that begins with the tenant seems as good as the right one. So whoever makes a young
-- table four times as large analyzes it, in the own transaction, never waiting for a lock; everybody plans anew.
CREATE OR REPLACE FUNCTION et_analyze_young() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_class c
        WHERE c.oid = 'public.et_messages'::regclass
          AND pg_relation_size(c.oid) > 4 * 8192 * greatest(c.relpages, 1)::BIGINT
    ) THEN
        ANALYZE (SKIP_LOCKED) public.et_tenants, public.et_channel_sessions, public.et_leads, public.et_lead_identities,
                              public.et_threads, public.et_messages, public.et_outbound_queue, public.et_events;
    END IF;
END
$$;

-- Everything that follows from stored messages, in one call a statement: it belongs after the insert, because BEFORE
-- triggers also run for duplicates. Most statements store messages of one thread: they are spared the larger plan.
-- The planner's switches as in 004_threads.sql: by index, whatever the size of the tables when the plan was made.
CREATE OR REPLACE FUNCTION et_message_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    stored RECORD;
BEGIN
    SELECT max(n.id) AS newest, min(n.thread_id) AS thread, max(n.thread_id) AS last_thread,
           coalesce(max(n.occurred_at) FILTER (WHERE NOT n.is_history), max(n.occurred_at)) AS latest,
           bool_or(NOT n.is_history) AS live, bool_or(n.direction = 'inbound' AND NOT n.is_history) AS work
    INTO stored
    FROM new_rows n;
    IF stored.newest IS NULL THEN
        RETURN NULL;  -- duplicates
    END IF;

    IF stored.thread = stored.last_thread THEN
        UPDATE public.et_threads t
        SET last_message_at = greatest(t.last_message_at, stored.latest),
            history_only = t.history_only AND NOT stored.live,
            updated_at = now()
        WHERE t.id = stored.thread
          AND (stored.live OR t.history_only)
          AND (t.last_message_at < stored.latest OR (stored.live AND t.history_only));
    ELSE
        -- In the order of ids, against deadlocks between two bulk writers.
        UPDATE public.et_threads t
        SET last_message_at = greatest(t.last_message_at, seen.latest),
            history_only = t.history_only AND NOT seen.live,
            updated_at = now()
        FROM (
            SELECT n.thread_id,
                   coalesce(max(n.occurred_at) FILTER (WHERE NOT n.is_history), max(n.occurred_at)) AS latest,
                   bool_or(NOT n.is_history) AS live
            FROM new_rows n
            GROUP BY n.thread_id
            ORDER BY n.thread_id
        ) seen
        WHERE t.id = seen.thread_id
          AND (seen.live OR t.history_only)
          AND (t.last_message_at < seen.latest OR (seen.live AND t.history_only));
    END IF;

    -- History wakes nobody and is not news.
    IF stored.live THEN
        INSERT INTO public.et_events (tenant_id, kind, ref_id)
        SELECT n.tenant_id, 'message', n.id
        FROM new_rows n
        WHERE NOT n.is_history;
        PERFORM pg_notify('et_events', '');
    END IF;
    IF stored.work THEN
        PERFORM pg_notify('et_inbound', '');
    END IF;
    IF stored.newest < 50000 AND (stored.newest < 256 OR stored.newest % 16 = 0) THEN
        PERFORM public.et_analyze_young();
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_messages_inserted
    AFTER INSERT ON et_messages REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_message_inserted();

CREATE OR REPLACE FUNCTION et_queue_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM new_rows) THEN
        PERFORM pg_notify('et_outbound', '');
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_outbound_queue_inserted
    AFTER INSERT ON et_outbound_queue REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_queue_inserted();

-- One function for the tables whose every change is an event of the same kind: TG_ARGV[0].
CREATE OR REPLACE FUNCTION et_row_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.et_events (tenant_id, kind, ref_id)
    SELECT n.tenant_id, TG_ARGV[0], n.id
    FROM new_rows n;
    IF FOUND THEN
        PERFORM pg_notify('et_events', '');
        IF TG_ARGV[0] = 'session' THEN
            PERFORM pg_notify('et_sessions', '');
        END IF;
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_channel_sessions_inserted
    AFTER INSERT ON et_channel_sessions REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_row_event('session');
CREATE OR REPLACE TRIGGER et_channel_sessions_updated
    AFTER UPDATE ON et_channel_sessions REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_row_event('session');
CREATE OR REPLACE TRIGGER et_decisions_inserted
    AFTER INSERT ON et_decisions REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_row_event('decision');
CREATE OR REPLACE TRIGGER et_thread_insights_inserted
    AFTER INSERT ON et_thread_insights REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_row_event('insight');
CREATE OR REPLACE TRIGGER et_thread_insights_updated
    AFTER UPDATE ON et_thread_insights REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_row_event('insight');

-- Wishes, QR codes and removed sessions: the owners look.
CREATE OR REPLACE FUNCTION et_session_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_notify('et_sessions', '');
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_session_runtime_changed
    AFTER INSERT OR UPDATE OR DELETE ON et_session_runtime
    FOR EACH STATEMENT EXECUTE FUNCTION et_session_changed();
CREATE OR REPLACE TRIGGER et_channel_sessions_deleted
    AFTER DELETE ON et_channel_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION et_session_changed();

-- Removes events older than a day (or p_keep) and answers how many. Any gateway may call it; twice does no harm.
CREATE OR REPLACE FUNCTION et_prune_events(p_keep INTERVAL DEFAULT INTERVAL '24 hours') RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    pruned BIGINT;
BEGIN
    DELETE FROM public.et_events WHERE created_at < now() - p_keep;
    GET DIAGNOSTICS pruned = ROW_COUNT;
    RETURN pruned;
END
$$;
