"""What the command line does besides serving: administration, the doctor, the demo."""
