"""WhatsApp on loopback: a server, phones and people for the unmodified client library to talk to.

Import `sandbox.whatsapp.sandbox.WhatsAppSandbox`. This file imports nothing, because the launcher's process
must load the real client library, and the rest of the package must not.
"""
