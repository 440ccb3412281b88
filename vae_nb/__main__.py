"""`python -m vae_nb`: the same as the command `vae_nb`."""

from vae_nb.app.cli import main

if __name__ == "__main__":
    main()
