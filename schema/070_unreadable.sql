-- What could not be read and nobody has sent again: how many of the last day there are is asked with every /health.
CREATE INDEX IF NOT EXISTS et_messages_unreadable ON et_messages (created_at)
    WHERE placeholder AND direction = 'inbound' AND NOT is_history;
