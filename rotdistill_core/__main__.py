"""`python -m rotdistill_core`: the command line, also for launchers such as torchrun."""

from rotdistill_core.cli import main

if __name__ == "__main__":
    main()
