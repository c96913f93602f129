-- What gateways need to share sessions between them, and the queue's indexes for what waits too long.

-- wanted 'deleted': log out on the channel, forget keys and credentials; the row of the session stays for its messages.
-- data_dir_id: where the session's files are; a gateway without them does not bid. NULL: nowhere yet.
-- pairing_state and pairing_reason say how the last pairing goes or went; action, what a person must do now.
ALTER TABLE et_session_runtime
    ADD COLUMN IF NOT EXISTS data_dir_id    TEXT,
    ADD COLUMN IF NOT EXISTS pairing_state  TEXT,
    ADD COLUMN IF NOT EXISTS pairing_reason TEXT,
    ADD COLUMN IF NOT EXISTS action         TEXT;
ALTER TABLE et_session_runtime DROP CONSTRAINT IF EXISTS et_session_runtime_wanted_ck;
ALTER TABLE et_session_runtime
    ADD CONSTRAINT et_session_runtime_wanted_ck CHECK (wanted IN ('connected', 'disconnected', 'deleted'));
ALTER TABLE et_session_runtime DROP CONSTRAINT IF EXISTS et_session_runtime_pairing_ck;
ALTER TABLE et_session_runtime
    ADD CONSTRAINT et_session_runtime_pairing_ck CHECK (pairing_state IN ('qr', 'code', 'paired', 'timeout', 'failed'));

-- A pending session whose number turned out to be an older session's: who asks for the old id is told the survivor's.
CREATE TABLE IF NOT EXISTS et_session_moves (
    tenant_id  BIGINT NOT NULL REFERENCES et_tenants (id) ON DELETE CASCADE,
    old_id     BIGINT NOT NULL,
    new_id     BIGINT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, old_id),
    FOREIGN KEY (tenant_id, new_id) REFERENCES et_channel_sessions (tenant_id, id) ON DELETE CASCADE
);
ALTER TABLE et_session_moves ENABLE ROW LEVEL SECURITY;
ALTER TABLE et_session_moves FORCE ROW LEVEL SECURITY;
REVOKE ALL ON et_session_moves FROM PUBLIC, et_worker, et_api, et_backend;
DROP POLICY IF EXISTS et_owner_all ON et_session_moves;
CREATE POLICY et_owner_all ON et_session_moves TO CURRENT_USER USING (true) WITH CHECK (true);
DROP POLICY IF EXISTS et_worker_all ON et_session_moves;
CREATE POLICY et_worker_all ON et_session_moves TO et_worker USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON et_session_moves TO et_worker;
DROP POLICY IF EXISTS et_api_own ON et_session_moves;
CREATE POLICY et_api_own ON et_session_moves TO et_api
    USING (tenant_id = (SELECT nullif(current_setting('app.tenant_id', true), '')::BIGINT))
    WITH CHECK (tenant_id = (SELECT nullif(current_setting('app.tenant_id', true), '')::BIGINT));
GRANT SELECT ON et_session_moves TO et_api;

CREATE INDEX IF NOT EXISTS et_outbound_queue_expiry ON et_outbound_queue (expires_at)
    WHERE status = 'queued' AND expires_at > '-infinity';
CREATE INDEX IF NOT EXISTS et_outbound_queue_unknown ON et_outbound_queue (id) WHERE status = 'unknown';
CREATE INDEX IF NOT EXISTS et_session_leases_by_owner ON et_session_leases (owner);
