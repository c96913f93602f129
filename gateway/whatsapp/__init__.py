"""The WhatsApp channel: a supervisor in the gateway, a child process per session that alone speaks WhatsApp."""
