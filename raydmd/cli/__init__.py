"""A file a command. Bad input gets one line and exit code 2; Ctrl-C leaves a run that can be continued (130)."""

from raydmd.cli.commands import app as app
from raydmd.cli.exit_codes import run as run
from raydmd.entry import main as main
