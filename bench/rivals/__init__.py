"""Other queues on PostgreSQL, drained beside ours: same server, same durability, alternating rounds."""
