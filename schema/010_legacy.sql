-- The step from et_conversation_threads and et_chat_messages: where their rows went, and the guard that is put on them
-- once they have been copied (see core/legacy.py). Without those tables nothing here is ever used.

CREATE TABLE IF NOT EXISTS et_legacy_threads (
    legacy_id BIGINT PRIMARY KEY,
    tenant_id BIGINT NOT NULL REFERENCES et_tenants (id) ON DELETE CASCADE,
    thread_id BIGINT NOT NULL,
    copied_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    FOREIGN KEY (tenant_id, thread_id) REFERENCES et_threads (tenant_id, id) ON DELETE CASCADE
);

CREATE OR REPLACE FUNCTION et_legacy_is_closed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- A merge moves the lead's rows along, an erased lead takes them with it (a cascade, one trigger deeper).
    IF (TG_OP = 'UPDATE' AND public.et_called_from('et_merge_leads(bigint,bigint,bigint)'))
        OR (TG_OP = 'DELETE' AND pg_trigger_depth() > 1) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% is closed: its rows were copied into et_threads and et_messages', TG_TABLE_NAME
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Write to et_messages and et_outbound_queue, or call et_enqueue_outbound().';
END
$$;
