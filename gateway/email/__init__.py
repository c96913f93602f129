"""Email: IMAP in, SMTP out. `channel.py` is the session, `convert.py` turns parsed mail into messages."""
