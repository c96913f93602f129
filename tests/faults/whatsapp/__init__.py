"""The promises that go through the real WhatsApp client, broken on purpose: see docs/reliability.md."""
