-- Whether the call of an attempt was begun, for channels that cannot be asked afterwards (Telegram). Whoever writes first
-- has the say: 'called' just before the call; 'withdrawn' by whoever settles what a dead gateway left, and then the call
-- can never be made. One row an attempt, kept a week; an attempt is settled within minutes.
CREATE TABLE IF NOT EXISTS et_send_intents (
    tenant_id          BIGINT NOT NULL REFERENCES et_tenants (id) ON DELETE CASCADE,
    channel_session_id BIGINT NOT NULL,
    queue_id           BIGINT NOT NULL,
    claim_epoch        BIGINT NOT NULL,
    kind               TEXT NOT NULL CHECK (kind IN ('called', 'withdrawn')),
    created_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (queue_id, claim_epoch),
    FOREIGN KEY (tenant_id, channel_session_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS et_send_intents_by_session ON et_send_intents (tenant_id, channel_session_id, created_at);

ALTER TABLE et_send_intents ENABLE ROW LEVEL SECURITY;
ALTER TABLE et_send_intents FORCE ROW LEVEL SECURITY;
REVOKE ALL ON et_send_intents FROM PUBLIC, et_worker, et_api, et_backend;
DROP POLICY IF EXISTS et_owner_all ON et_send_intents;
CREATE POLICY et_owner_all ON et_send_intents TO CURRENT_USER USING (true) WITH CHECK (true);
DROP POLICY IF EXISTS et_worker_all ON et_send_intents;
CREATE POLICY et_worker_all ON et_send_intents TO et_worker USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON et_send_intents TO et_worker;
