"""`python -m absorb_plugin.cli` is `absorb`, whose commands are in `absorb_cli`."""

from absorb_cli.app import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
