"""One module per table family: the SQL beside the function that runs it. Functions take a connection and never open one."""
