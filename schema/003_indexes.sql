-- Indexes. Those of the queue and of inbound work are partial: they hold what is waiting, not what ever was.
-- An id names its tenant, so an index by thread, lead or session does not begin with the tenant: for a tenant of whom the
-- statistics know nothing, any index that begins with it seems to find a single row, and reads everything the tenant has.
-- When little waits the planner takes any of them for one page and may keep a plan that reads the whole of the wrong one
-- after a campaign has come in. So each on a hot path has a condition of its own that only its own queries state
-- (thread_id > 0 and the like): no other query can use it.

-- One active thread per lead and session. Two first messages at the same instant meet here.
CREATE UNIQUE INDEX IF NOT EXISTS et_threads_one_active
    ON et_threads (tenant_id, lead_id, channel_session_id) WHERE status = 'active';
-- No index is on last_message_at: storing a message would write to every index of its thread. Whoever wants the latest
-- threads orders by recent_at first: WHERE recent_at > '-infinity' ORDER BY recent_at DESC, last_message_at DESC, id DESC.
CREATE INDEX IF NOT EXISTS et_threads_by_lead ON et_threads (lead_id);
CREATE INDEX IF NOT EXISTS et_threads_recent ON et_threads (tenant_id, recent_at DESC)
    WHERE recent_at > '-infinity';
CREATE INDEX IF NOT EXISTS et_threads_by_session ON et_threads (channel_session_id);
CREATE INDEX IF NOT EXISTS et_threads_by_agent ON et_threads (agent_id) WHERE agent_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS et_leads_by_workspace ON et_leads (tenant_id, workspace_id) WHERE workspace_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS et_workspaces_by_agent ON et_workspaces (tenant_id, agent_id) WHERE agent_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS et_lead_identities_by_lead ON et_lead_identities (lead_id, created_at);
CREATE INDEX IF NOT EXISTS et_lead_merges_by_new ON et_lead_merges (tenant_id, new_id);

-- The two orders people read messages in.
CREATE INDEX IF NOT EXISTS et_messages_by_thread ON et_messages (thread_id, occurred_at, id);
CREATE INDEX IF NOT EXISTS et_messages_by_lead ON et_messages (lead_id, occurred_at, id);
-- Inbound work: waiting, and claimed.
CREATE INDEX IF NOT EXISTS et_messages_received ON et_messages (id, thread_id)
    WHERE inbound_work = 1 AND id > 0;
CREATE INDEX IF NOT EXISTS et_messages_received_by_thread ON et_messages (thread_id, id)
    WHERE inbound_work = 1 AND thread_id > 0;
-- Could not be read and waits to be filled or given up.
CREATE INDEX IF NOT EXISTS et_messages_placeholders ON et_messages (created_at)
    WHERE inbound_work = 3;
CREATE INDEX IF NOT EXISTS et_messages_processing ON et_messages (id)
    WHERE inbound_work = 2;
-- Receipts and echoes know the session and the channel's id, not always the lead.
CREATE INDEX IF NOT EXISTS et_messages_outbound_by_channel_id ON et_messages (channel_session_id, channel_message_id)
    WHERE direction = 'outbound';

CREATE INDEX IF NOT EXISTS et_inbound_claims_by_thread ON et_inbound_claims (thread_id);
CREATE INDEX IF NOT EXISTS et_inbound_claims_by_owner ON et_inbound_claims (owner);

-- The claim query walks this one, session by session.
CREATE INDEX IF NOT EXISTS et_outbound_queue_lanes
    ON et_outbound_queue (channel_session_id, lane DESC, priority DESC, next_attempt_at, id) WHERE status = 'queued';
-- What waits or is in flight in a thread, in its order of sending.
CREATE INDEX IF NOT EXISTS et_outbound_queue_thread ON et_outbound_queue (thread_id, send_at, id)
    WHERE status IN ('queued', 'dispatching') AND thread_id > 0;
CREATE INDEX IF NOT EXISTS et_outbound_queue_dispatching ON et_outbound_queue (channel_session_id, claimed_at)
    WHERE status = 'dispatching';
-- What an operator looks at.
CREATE INDEX IF NOT EXISTS et_outbound_queue_trouble ON et_outbound_queue (tenant_id, status, id)
    WHERE status IN ('failed', 'unknown');
CREATE INDEX IF NOT EXISTS et_outbound_queue_by_tenant ON et_outbound_queue (tenant_id, id) WHERE id > 0;

CREATE INDEX IF NOT EXISTS et_thread_insights_by_lead ON et_thread_insights (tenant_id, lead_id);
CREATE INDEX IF NOT EXISTS et_thread_insights_followup ON et_thread_insights (tenant_id, next_followup_at)
    WHERE next_followup_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS et_decisions_by_thread ON et_decisions (tenant_id, thread_id, id);
CREATE INDEX IF NOT EXISTS et_decisions_by_reply ON et_decisions (tenant_id, reply_message_id) WHERE reply_message_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS et_audit_log_by_tenant ON et_audit_log (tenant_id, id);
CREATE INDEX IF NOT EXISTS et_api_keys_by_tenant ON et_api_keys (tenant_id, id);
CREATE UNIQUE INDEX IF NOT EXISTS et_api_keys_by_prefix ON et_api_keys (prefix);
CREATE INDEX IF NOT EXISTS et_events_age ON et_events USING brin (created_at);
