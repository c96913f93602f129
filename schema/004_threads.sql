-- Every message has a thread, every lead an identity: filled in by triggers, deterministic, no outside calls.
-- What follows once messages are stored (last_message_at, events, wake-ups) stands in 006_events.sql.
--
-- enable_seqscan is off in functions on the hot path: a plan cached by a long connection while a table was
-- tiny would otherwise go on reading the whole table after it has grown.

-- Fills what a writer need not invent, then finds or creates the thread.
-- A duplicate must not leave an empty thread behind, so before a thread is created its dedupe key is looked up;
-- with an active thread at hand that is not needed, the unique key refuses the duplicate anyway.
CREATE OR REPLACE FUNCTION et_message_before_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    outbound CONSTANT BOOLEAN := NEW.direction = 'outbound';
    session_channel TEXT;
    session_address TEXT;
BEGIN
    IF NEW.channel IS NULL OR (outbound AND NEW.sender_identifier IS NULL) THEN
        SELECT s.channel_type, s.session_identifier
        INTO session_channel, session_address
        FROM public.et_channel_sessions s
        WHERE s.id = NEW.channel_session_id AND s.tenant_id = NEW.tenant_id;
        NEW.channel := coalesce(NEW.channel, session_channel);
        IF outbound THEN
            NEW.sender_identifier := coalesce(NEW.sender_identifier, session_address);
        END IF;
    END IF;
    IF NEW.role IS NULL THEN
        NEW.role := CASE WHEN outbound THEN 'assistant' ELSE 'user' END;
    END IF;
    IF NEW.delivery_status IS NULL THEN
        NEW.delivery_status := CASE WHEN NOT outbound THEN 'received' WHEN NEW.is_history THEN 'sent' ELSE 'queued' END;
    END IF;
    IF NEW.occurred_at IS NULL AND NEW.channel_timestamp IS NOT NULL AND (NEW.is_history OR NOT outbound) THEN
        NEW.occurred_at := to_timestamp(NEW.channel_timestamp / 1000.0);
    END IF;
    -- A phone whose clock runs ahead must not pin its message to the end of the thread.
    NEW.occurred_at := least(coalesce(NEW.occurred_at, now()), clock_timestamp());

    IF NEW.thread_id IS NOT NULL OR NEW.tenant_id IS NULL OR NEW.lead_id IS NULL
        OR NEW.channel_session_id IS NULL OR NEW.channel IS NULL THEN
        RETURN NEW;  -- what is missing is refused by its NOT NULL, by name
    END IF;

    SELECT t.id INTO NEW.thread_id
    FROM public.et_threads t
    WHERE t.tenant_id = NEW.tenant_id
      AND t.lead_id = NEW.lead_id
      AND t.channel_session_id = NEW.channel_session_id
      AND t.status = 'active';
    IF FOUND THEN
        RETURN NEW;
    END IF;

    SELECT m.thread_id INTO NEW.thread_id
    FROM public.et_messages m
    WHERE m.tenant_id = NEW.tenant_id
      AND m.channel_session_id = NEW.channel_session_id
      AND m.lead_id = NEW.lead_id
      AND m.channel_message_id = NEW.channel_message_id;
    IF FOUND THEN
        RETURN NEW;
    END IF;

    -- History joins what is there, archived or not: importing the past re-opens nothing.
    IF NEW.is_history THEN
        SELECT t.id INTO NEW.thread_id
        FROM public.et_threads t
        WHERE t.tenant_id = NEW.tenant_id
          AND t.lead_id = NEW.lead_id
          AND t.channel_session_id = NEW.channel_session_id
        ORDER BY t.last_message_at DESC, t.id DESC
        LIMIT 1;
        IF FOUND THEN
            RETURN NEW;
        END IF;
    END IF;

    FOR attempt IN 1..5 LOOP
        INSERT INTO public.et_threads AS t
            (tenant_id, lead_id, channel, channel_session_id, last_message_at, history_only)
        VALUES (NEW.tenant_id, NEW.lead_id, NEW.channel, NEW.channel_session_id, NEW.occurred_at, NEW.is_history)
        ON CONFLICT (tenant_id, lead_id, channel_session_id) WHERE status = 'active' DO NOTHING
        RETURNING t.id INTO NEW.thread_id;
        IF FOUND THEN
            RETURN NEW;
        END IF;
        -- Another transaction was first, and has committed: a fresh statement sees its thread,
        -- unless that one was archived in between, then once more.
        SELECT t.id INTO NEW.thread_id
        FROM public.et_threads t
        WHERE t.tenant_id = NEW.tenant_id
          AND t.lead_id = NEW.lead_id
          AND t.channel_session_id = NEW.channel_session_id
          AND t.status = 'active';
        IF FOUND THEN
            RETURN NEW;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'no thread could be found or created for lead % on session %', NEW.lead_id, NEW.channel_session_id
        USING ERRCODE = 'serialization_failure', HINT = 'Run the transaction again.';
END
$$;

-- The active threads of so many rows at once, in their order, NULL where there is none: for writers of batches, which
-- then pay for one call instead of one a row. Its one plan is by index for any number of rows; planning it for each
-- call, as a function would with arrays, cost more than looking up five threads.
CREATE OR REPLACE FUNCTION et_active_threads(p_tenants BIGINT[], p_leads BIGINT[], p_sessions BIGINT[])
RETURNS SETOF BIGINT
LANGUAGE plpgsql STABLE ROWS 100 SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    RETURN QUERY
    SELECT (
        SELECT t.id
        FROM public.et_threads t
        WHERE t.tenant_id = r.tenant_id
          AND t.lead_id = r.lead_id
          AND t.channel_session_id = r.session_id
          AND t.status = 'active'
    )
    FROM unnest(p_tenants, p_leads, p_sessions) AS r (tenant_id, lead_id, session_id);
END
$$;

-- A writer that brings complete rows, with the active thread they go to, pays only for this look: a call of the
-- function is the dearest step of storing a row. Whatever is missing, or says it is from the future, goes through it.
CREATE OR REPLACE TRIGGER et_messages_before_insert
    BEFORE INSERT ON et_messages
    FOR EACH ROW
    WHEN (NEW.thread_id IS NULL OR NEW.channel IS NULL OR NEW.role IS NULL OR NEW.delivery_status IS NULL
        OR NEW.occurred_at IS NULL OR NEW.occurred_at > clock_timestamp()
        OR (NEW.sender_identifier IS NULL AND NEW.direction = 'outbound'))
    EXECUTE FUNCTION et_message_before_insert();

-- A lead's external_id is its first identity. One that already belongs to somebody else is refused:
-- the writer looks the identity up again and uses that lead.
CREATE OR REPLACE FUNCTION et_lead_after_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.et_lead_identities (tenant_id, external_id, lead_id)
    SELECT n.tenant_id, n.external_id, n.id
    FROM new_rows n
    ORDER BY n.tenant_id, n.external_id;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_leads_after_insert
    AFTER INSERT ON et_leads REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_lead_after_insert();

-- A lead that learns a better external_id (the phone number behind a LID) keeps the old one as an identity.
CREATE OR REPLACE FUNCTION et_lead_external_id_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.et_lead_identities AS i (tenant_id, external_id, lead_id)
    VALUES (NEW.tenant_id, NEW.external_id, NEW.id)
    ON CONFLICT (tenant_id, external_id) DO UPDATE SET lead_id = excluded.lead_id WHERE i.lead_id = excluded.lead_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'identity % already belongs to another lead', NEW.external_id
            USING ERRCODE = 'unique_violation', HINT = 'Merge the two leads with et_merge_leads().';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_leads_external_id_changed
    AFTER UPDATE OF external_id ON et_leads
    FOR EACH ROW WHEN (OLD.external_id IS DISTINCT FROM NEW.external_id)
    EXECUTE FUNCTION et_lead_external_id_changed();

-- Leads of an adopted table were there before the trigger.
INSERT INTO et_lead_identities (tenant_id, external_id, lead_id)
SELECT l.tenant_id, l.external_id, l.id FROM et_leads l
ON CONFLICT DO NOTHING;

CREATE OR REPLACE FUNCTION et_touch() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER et_agents_touch BEFORE UPDATE ON et_agents FOR EACH ROW EXECUTE FUNCTION et_touch();
CREATE OR REPLACE TRIGGER et_leads_touch BEFORE UPDATE ON et_leads FOR EACH ROW EXECUTE FUNCTION et_touch();
CREATE OR REPLACE TRIGGER et_channel_sessions_touch BEFORE UPDATE ON et_channel_sessions FOR EACH ROW EXECUTE FUNCTION et_touch();
CREATE OR REPLACE TRIGGER et_thread_insights_touch BEFORE UPDATE ON et_thread_insights FOR EACH ROW EXECUTE FUNCTION et_touch();
