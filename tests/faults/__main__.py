"""`python -m tests.faults p4 --seed 7 --kills 50`."""

from tests.faults.run import main

main()
