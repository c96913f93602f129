-- Two leads turn out to be one person.

-- The lead that answers for an id today: itself, or the survivor of its merge. NULL: never was, or erased.
CREATE OR REPLACE FUNCTION et_current_lead(p_tenant_id BIGINT, p_lead_id BIGINT) RETURNS BIGINT
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(
        (SELECT l.id FROM public.et_leads l WHERE l.tenant_id = p_tenant_id AND l.id = p_lead_id),
        (SELECT m.new_id FROM public.et_lead_merges m WHERE m.tenant_id = p_tenant_id AND m.old_id = p_lead_id))
$$;

-- The same channel message stored under both leads: p_gone goes, p_kept takes over its decision, its queue row and
-- whatever it got further. Internal.
CREATE OR REPLACE FUNCTION et_merge_messages(p_kept BIGINT, p_gone BIGINT) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    kept public.et_messages;
    gone public.et_messages;
    step TEXT;
BEGIN
    SELECT m.* INTO STRICT kept FROM public.et_messages m WHERE m.id = p_kept FOR UPDATE;
    SELECT m.* INTO STRICT gone FROM public.et_messages m WHERE m.id = p_gone FOR UPDATE;

    UPDATE public.et_decisions d SET message_id = kept.id, thread_id = kept.thread_id
    WHERE d.message_id = gone.id
      AND NOT EXISTS (SELECT 1 FROM public.et_decisions o WHERE o.message_id = kept.id);
    UPDATE public.et_decisions d SET reply_message_id = kept.id WHERE d.reply_message_id = gone.id;
    UPDATE public.et_outbound_queue q SET message_id = kept.id, thread_id = kept.thread_id
    WHERE q.message_id = gone.id
      AND NOT EXISTS (SELECT 1 FROM public.et_outbound_queue o WHERE o.message_id = kept.id);

    IF kept.direction = gone.direction AND kept.delivery_status <> gone.delivery_status THEN
        FOREACH step IN ARRAY CASE
            WHEN kept.direction = 'inbound' AND gone.delivery_status NOT IN ('received', 'inbound_processing') THEN
                CASE kept.delivery_status
                    WHEN 'received' THEN ARRAY['inbound_processing', gone.delivery_status]
                    WHEN 'inbound_processing' THEN ARRAY[gone.delivery_status]
                    ELSE '{}' END
            WHEN kept.delivery_status = 'unknown' AND gone.delivery_status IN ('sent', 'delivered', 'read') THEN
                ARRAY[gone.delivery_status]
            WHEN kept.delivery_status = 'sent' AND gone.delivery_status = 'delivered' THEN ARRAY['delivered']
            WHEN kept.delivery_status = 'sent' AND gone.delivery_status = 'read' THEN ARRAY['delivered', 'read']
            WHEN kept.delivery_status = 'delivered' AND gone.delivery_status = 'read' THEN ARRAY['read']
            ELSE '{}' END
        LOOP
            UPDATE public.et_messages m SET delivery_status = step WHERE m.id = kept.id;
        END LOOP;
    END IF;
    -- An item whose outcome was unknown is settled by the other row's proof.
    UPDATE public.et_outbound_queue q SET status = 'sent'
    FROM public.et_messages m
    WHERE q.message_id = kept.id AND m.id = kept.id
      AND q.status = 'unknown' AND m.delivery_status IN ('sent', 'delivered', 'read');
    DELETE FROM public.et_messages m WHERE m.id = gone.id;
END
$$;

-- One transaction, both leads locked in id order: the lower id survives. Answers the survivor's id.
-- Repeating it, or naming an id that was merged away earlier, changes nothing more.
CREATE OR REPLACE FUNCTION et_merge_leads(tenant_id BIGINT, a BIGINT, b BIGINT) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    p_tenant CONSTANT BIGINT := et_merge_leads.tenant_id;
    keep_id BIGINT;
    gone_id BIGINT;
    keep public.et_leads;
    gone public.et_leads;
    pair RECORD;
    foreign_key RECORD;
BEGIN
    IF NOT coalesce(public.et_may_act(p_tenant), false) THEN
        RAISE EXCEPTION '% may not merge leads of tenant %', session_user, p_tenant USING ERRCODE = 'insufficient_privilege';
    END IF;
    keep_id := least(a, b);
    gone_id := greatest(a, b);
    FOR attempt IN 1..5 LOOP
        keep_id := public.et_current_lead(p_tenant, keep_id);
        gone_id := public.et_current_lead(p_tenant, gone_id);
        IF keep_id IS NULL OR gone_id IS NULL THEN
            RAISE EXCEPTION 'lead % or % does not exist in tenant %', a, b, p_tenant USING ERRCODE = 'no_data_found';
        ELSIF keep_id = gone_id THEN
            RETURN keep_id;
        END IF;
        SELECT least(keep_id, gone_id), greatest(keep_id, gone_id) INTO keep_id, gone_id;
        -- FOR UPDATE also holds back new messages of both: their foreign key wants a share of these rows.
        SELECT l.* INTO keep FROM public.et_leads l WHERE l.tenant_id = p_tenant AND l.id = keep_id FOR UPDATE;
        IF FOUND THEN
            SELECT l.* INTO gone FROM public.et_leads l WHERE l.tenant_id = p_tenant AND l.id = gone_id FOR UPDATE;
            EXIT WHEN FOUND;
        END IF;
    END LOOP;
    IF gone.id IS NULL OR keep.id IS NULL THEN
        RAISE EXCEPTION 'leads % and % are being merged by others', a, b
            USING ERRCODE = 'serialization_failure', HINT = 'Run the transaction again.';
    END IF;
    IF keep.kind <> 'person' OR gone.kind <> 'person' THEN
        RAISE EXCEPTION 'a group is a lead of its own and cannot be merged' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    UPDATE public.et_lead_identities i SET lead_id = keep.id WHERE i.tenant_id = p_tenant AND i.lead_id = gone.id;

    FOR pair IN
        SELECT least(k.id, g.id) AS kept, greatest(k.id, g.id) AS gone
        FROM public.et_messages g
        JOIN public.et_messages k
          ON k.tenant_id = g.tenant_id AND k.channel_session_id = g.channel_session_id
         AND k.lead_id = keep.id AND k.channel_message_id = g.channel_message_id
        WHERE g.tenant_id = p_tenant AND g.lead_id = gone.id
        ORDER BY 1
    LOOP
        PERFORM public.et_merge_messages(pair.kept, pair.gone);
    END LOOP;

    -- Two active threads of one session become the one with the lower id.
    FOR pair IN
        SELECT least(k.id, g.id) AS kept, greatest(k.id, g.id) AS gone
        FROM public.et_threads g
        JOIN public.et_threads k
          ON k.tenant_id = g.tenant_id AND k.channel_session_id = g.channel_session_id
         AND k.lead_id = keep.id AND k.status = 'active'
        WHERE g.tenant_id = p_tenant AND g.lead_id = gone.id AND g.status = 'active'
        ORDER BY 1
    LOOP
        PERFORM 1 FROM public.et_threads t WHERE t.id IN (pair.kept, pair.gone) ORDER BY t.id FOR UPDATE;
        UPDATE public.et_messages m SET thread_id = pair.kept WHERE m.tenant_id = p_tenant AND m.thread_id = pair.gone;
        UPDATE public.et_outbound_queue q SET thread_id = pair.kept
        WHERE q.message_id IN (SELECT m.id FROM public.et_messages m WHERE m.tenant_id = p_tenant AND m.thread_id = pair.kept)
          AND q.thread_id = pair.gone;
        UPDATE public.et_decisions d SET thread_id = pair.kept WHERE d.tenant_id = p_tenant AND d.thread_id = pair.gone;
        UPDATE public.et_inbound_claims c SET thread_id = pair.kept WHERE c.thread_id = pair.gone;
        DELETE FROM public.et_thread_insights i WHERE i.thread_id IN (pair.kept, pair.gone);
        UPDATE public.et_threads t
        SET handled_by = CASE WHEN 'human' IN (t.handled_by, o.handled_by) THEN 'human' ELSE 'agent' END,
            agent_id = coalesce(t.agent_id, o.agent_id),
            last_message_at = CASE WHEN t.history_only = o.history_only THEN greatest(t.last_message_at, o.last_message_at)
                                   WHEN t.history_only THEN o.last_message_at ELSE t.last_message_at END,
            history_only = t.history_only AND o.history_only,
            created_at = least(t.created_at, o.created_at),
            updated_at = now()
        FROM public.et_threads o
        WHERE t.id = pair.kept AND o.id = pair.gone;
        DELETE FROM public.et_threads t WHERE t.id = pair.gone;
    END LOOP;

    UPDATE public.et_threads t SET lead_id = keep.id, updated_at = now() WHERE t.tenant_id = p_tenant AND t.lead_id = gone.id;
    UPDATE public.et_messages m SET lead_id = keep.id WHERE m.tenant_id = p_tenant AND m.lead_id = gone.id;
    UPDATE public.et_thread_insights i SET lead_id = keep.id WHERE i.tenant_id = p_tenant AND i.lead_id = gone.id;

    UPDATE public.et_lead_merges m SET new_id = keep.id WHERE m.tenant_id = p_tenant AND m.new_id = gone.id;
    INSERT INTO public.et_lead_merges (tenant_id, old_id, new_id) VALUES (p_tenant, gone.id, keep.id);

    -- Tables of a backend's own that point at the lead: they follow, else the lead could not go.
    FOR foreign_key IN
        SELECT c.conrelid::regclass AS tbl, a.attname AS col
        FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid
        JOIN pg_attribute id ON id.attrelid = c.confrelid AND id.attname = 'id'
        WHERE c.contype = 'f' AND c.confrelid = 'public.et_leads'::regclass AND c.conparentid = 0
          AND a.attnum = c.conkey[array_position(c.confkey, id.attnum)]
          AND c.conrelid NOT IN ('public.et_lead_identities'::regclass, 'public.et_lead_merges'::regclass,
                                 'public.et_threads'::regclass, 'public.et_messages'::regclass,
                                 'public.et_thread_insights'::regclass)
        ORDER BY 1, 2
    LOOP
        EXECUTE format('UPDATE %s SET %I = $1 WHERE %I = $2', foreign_key.tbl, foreign_key.col, foreign_key.col)
        USING keep.id, gone.id;
    END LOOP;

    -- The unique external_id passes on, so the other row goes first.
    DELETE FROM public.et_leads l WHERE l.tenant_id = p_tenant AND l.id = gone.id;
    UPDATE public.et_leads l
    SET external_id = CASE
            WHEN keep.external_id LIKE 'whatsapp:%' THEN keep.external_id
            WHEN gone.external_id LIKE 'whatsapp:%' THEN gone.external_id
            WHEN keep.external_id LIKE 'whatsapp-lid:%' THEN gone.external_id
            ELSE keep.external_id END,
        name = coalesce(keep.name, gone.name),
        timezone = coalesce(keep.timezone, gone.timezone),
        workspace_id = coalesce(keep.workspace_id, gone.workspace_id),
        tags = ARRAY(SELECT DISTINCT tag FROM unnest(keep.tags || gone.tags) tag ORDER BY tag),
        opted_out_at = least(keep.opted_out_at, gone.opted_out_at),
        created_at = least(keep.created_at, gone.created_at)
    WHERE l.tenant_id = p_tenant AND l.id = keep.id;

    INSERT INTO public.et_audit_log (tenant_id, actor, event, subject_type, subject_id, detail)
    VALUES (p_tenant, coalesce(nullif(current_setting('app.actor', true), ''), 'system'), 'lead_merged', 'lead',
            keep.id::TEXT, jsonb_build_object('old_id', gone.id, 'new_id', keep.id));
    RETURN keep.id;
END
$$;

-- Two external ids were proven to be one person (LID and phone). Merges their leads when both have one, else the one lead
-- gets both. The phone number becomes the lead's external_id. NULL: nobody has either yet.
CREATE OR REPLACE FUNCTION et_link_identities(p_tenant_id BIGINT, p_one TEXT, p_other TEXT) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    one BIGINT;
    other BIGINT;
BEGIN
    IF NOT coalesce(public.et_may_act(p_tenant_id), false) THEN
        RAISE EXCEPTION '% may not link identities of tenant %', session_user, p_tenant_id USING ERRCODE = 'insufficient_privilege';
    END IF;
    SELECT i.lead_id INTO one FROM public.et_lead_identities i WHERE i.tenant_id = p_tenant_id AND i.external_id = p_one;
    SELECT i.lead_id INTO other FROM public.et_lead_identities i WHERE i.tenant_id = p_tenant_id AND i.external_id = p_other;
    IF one IS NOT NULL AND other IS NOT NULL THEN
        RETURN CASE WHEN one = other THEN one ELSE public.et_merge_leads(p_tenant_id, one, other) END;
    ELSIF one IS NULL AND other IS NULL THEN
        RETURN NULL;
    END IF;
    INSERT INTO public.et_lead_identities (tenant_id, external_id, lead_id)
    VALUES (p_tenant_id, CASE WHEN one IS NULL THEN p_one ELSE p_other END, coalesce(one, other));
    UPDATE public.et_leads l
    SET external_id = CASE WHEN one IS NULL THEN p_one ELSE p_other END
    WHERE l.tenant_id = p_tenant_id AND l.id = coalesce(one, other)
      AND l.external_id LIKE 'whatsapp-lid:%'
      AND (CASE WHEN one IS NULL THEN p_one ELSE p_other END) LIKE 'whatsapp:%';
    RETURN coalesce(one, other);
END
$$;
