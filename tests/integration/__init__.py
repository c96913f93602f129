"""Tests of the parts as they really are: PostgreSQL, the client library, sockets."""
