-- What the pilot is judged by. Sends are counted in the queue itself; suppressed duplicates leave no row, so every gateway
-- adds what it counted to the hour's row. Nobody's data: no tenant, no address.
CREATE TABLE IF NOT EXISTS et_pilot_hours (
    hour       TIMESTAMPTZ NOT NULL,
    channel    TEXT NOT NULL,
    duplicates BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (hour, channel)
);
ALTER TABLE et_pilot_hours ENABLE ROW LEVEL SECURITY;
ALTER TABLE et_pilot_hours FORCE ROW LEVEL SECURITY;
REVOKE ALL ON et_pilot_hours FROM PUBLIC, et_worker, et_api, et_backend;
DROP POLICY IF EXISTS et_owner_all ON et_pilot_hours;
CREATE POLICY et_owner_all ON et_pilot_hours TO CURRENT_USER USING (true) WITH CHECK (true);
DROP POLICY IF EXISTS et_worker_all ON et_pilot_hours;
CREATE POLICY et_worker_all ON et_pilot_hours TO et_worker USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON et_pilot_hours TO et_worker;

-- The last day of the queue without reading all of it. Rows are never rewritten in this column and come in its order, so a
-- block range index costs writers next to nothing.
CREATE INDEX IF NOT EXISTS et_outbound_queue_created ON et_outbound_queue USING brin (created_at) WITH (pages_per_range = 16);
