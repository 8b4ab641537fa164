"""`python -m minisd.training`: trains the bundled model, stage by stage."""

from .training import main

if __name__ == "__main__":
    main()
