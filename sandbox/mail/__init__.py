"""Mail on loopback: an SMTP and an IMAP server in one process, with people who write and faults on demand."""

from sandbox.mail.server import Letter, MailSandbox, Person

__all__ = ["Letter", "MailSandbox", "Person"]
