"""`python -m absorb_plugin.cli` is `absorb`."""

from absorb_plugin.cli.app import app

if __name__ == "__main__":
    app()
