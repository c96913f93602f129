-- People who were erased, or opted out for good, stay so: whoever makes a lead with one of their addresses makes one that
-- is opted out. What they said before is kept out by the gateway, which knows when it was said (core/leads.py).

-- How et_suppressions names an address. The core computes the same.
CREATE OR REPLACE FUNCTION et_identity_hash(p_tenant_id BIGINT, p_external_id TEXT) RETURNS BYTEA
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN sha256(convert_to(p_tenant_id || ':' || p_external_id, 'UTF8'));
END
$$;

CREATE OR REPLACE FUNCTION et_identity_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    UPDATE public.et_leads l
    SET opted_out_at = s.created_at
    FROM new_rows n
    JOIN public.et_suppressions s
        ON s.tenant_id = n.tenant_id AND s.identity_hash = public.et_identity_hash(n.tenant_id, n.external_id)
    WHERE l.tenant_id = n.tenant_id
      AND l.id = n.lead_id
      AND l.opted_out_at IS NULL;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER et_lead_identities_inserted
    AFTER INSERT ON et_lead_identities REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION et_identity_inserted();

REVOKE ALL ON FUNCTION et_identity_hash(BIGINT, TEXT), et_identity_inserted() FROM PUBLIC, et_worker, et_api, et_backend;
GRANT EXECUTE ON FUNCTION et_identity_hash(BIGINT, TEXT) TO et_worker, et_api;
