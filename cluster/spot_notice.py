#!/usr/bin/env python3
"""Turn a cloud's notice that it takes this machine away into Ray's drain state for this node.

``watch`` runs beside ``ray start`` and asks the cloud's metadata server; ``now`` is for a Kubernetes preStop hook.
A drained node keeps its actors and gets no new ones; who reads Ray's draining nodes sees it with its deadline. A
worker node that is drained and idle leaves by itself. Ray takes any new deadline, so a later one than stands is never
sent. Needs Ray, click and the files beside this one. Notices and the time that they leave:

======  ==================================================  ==========================================================
aws     spot/instance-action                                until its ``time`` (about two minutes)
aws     events/recommendations/rebalance                    none is told: ``--rebalance-deadline``
gcp     instance/preempted                                  30 seconds
gcp     instance/maintenance-event TERMINATE_ON_...         60 seconds
azure   Preempt, Terminate, Redeploy, Reboot for this VM    until ``NotBefore``; none when it has started
======  ==================================================  ==========================================================

Ray's token authentication works as for ``ray start``: by RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or the
file ~/.ray/auth_token.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import click
from clouds import LINK_LOCAL, SOURCES, MetadataError, Notice, discover
from ray_node import RAY_SETTINGS, LocalNode, NoNode, Unreachable, host_port, is_host_port

LONGEST_PAUSE = 10.0  # seconds between two tries when the metadata server fails
GRACE = 30.0  # seconds for which a notice without time left is tried still
PAUSE = 0.5  # seconds between two questions to Ray


def say(text: str) -> None:
    """Write one line to stderr, whatever line breaks an error's text has."""
    click.echo("spot_notice: " + " ".join(text.split()), err=True)


@dataclass
class Complaints:
    """Says what is wrong once a subject, until it is right again."""

    said: set[str] = field(default_factory=set)

    def say(self, subject: str, text: str) -> None:
        """Say ``text`` unless ``subject`` is wrong already."""
        if subject not in self.said:
            self.said.add(subject)
            say(text)

    def over(self, subject: str, text: str) -> None:
        """Say ``text`` if ``subject`` was wrong."""
        if subject in self.said:
            self.said.remove(subject)
            say(text)


def check_address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check --address."""
    return value and host_port(value, "--address")


def check_node_id(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check --node-id."""
    if value is not None and not re.fullmatch(r"[0-9a-f]{56}", value):
        raise click.UsageError(f"--node-id: {value!r} is not a Ray node's id: 56 digits of 0-9 and a-f")
    return value


def check_url(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Check --metadata-url."""
    place = value.removeprefix("http://").removesuffix("/")
    if not value.startswith("http://") or not (is_host_port(place) or is_host_port(f"{place}:80")):
        raise click.UsageError(f"--metadata-url: {value!r} is not http://HOST[:PORT], for example {LINK_LOCAL}")
    return value.rstrip("/")


def check_seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Check a number of seconds, which click lets be no number."""
    if not 0.01 <= value <= 1e6:
        raise click.UsageError(f"{parameter.opts[0]}: {value} is not a number of seconds from 0.01 to 1000000")
    return value


def node_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which node of which Ray."""
    node_help = "Ray's id of the node; by default the alive node at RAY_NODE_IP, POD_IP or an interface's address."
    address_help = "HOST:PORT of Ray's GCS; by default RAY_ADDRESS, else the Ray that was started on this host."
    command = click.option("--node-id", metavar="HEX", callback=check_node_id, help=node_help)(command)
    return click.option("--address", metavar="HOST:PORT", callback=check_address, help=address_help)(command)


@click.group(no_args_is_help=False)
def cli() -> None:
    """Turn a cloud's spot notice into Ray's drain state for this node.

    Example: spot_notice.py watch --cloud aws
    """


@cli.command()
@click.option("--cloud", type=click.Choice(["auto", *SOURCES]), default="auto", show_default=True, help="The cloud.")
@click.option("--every", default=2.0, show_default=True, callback=check_seconds, help="Seconds between two polls.")
@click.option(
    "--metadata-url", default=LINK_LOCAL, show_default=True, callback=check_url, help="The metadata server, for tests."
)
@click.option(
    "--rebalance-deadline", default=120.0, show_default=True, callback=check_seconds,
    help="Seconds that an AWS rebalance recommendation is taken to leave.",
)  # fmt: skip
@click.option("--ignore-rebalance", is_flag=True, help="Do not drain for an AWS rebalance recommendation.")
@click.option("--once", is_flag=True, help="End after the first notice that was passed on.")
@node_options
def watch(
    cloud: str, every: float, metadata_url: str, rebalance_deadline: float, ignore_rebalance: bool, once: bool,
    address: str | None, node_id: str | None,
) -> None:  # fmt: skip
    """Wait for notices; drain this node at each and print a line of JSON.

    Example: spot_notice.py watch --cloud aws
    """
    local, complaints = LocalNode(address, node_id), Complaints()
    try:  # what only the user can mend is told now, not when the notice comes
        local.find(local.connect())
    except Unreachable as error:
        complaints.say("ray", f"Ray cannot be reached yet: {error}")
    except NoNode as error:
        complaints.say("ray", f"{error.message} (looked for again at a notice)")
    rebalance = None if ignore_rebalance else rebalance_deadline
    source = None if cloud == "auto" else SOURCES[cloud](metadata_url, rebalance)
    pending: dict[str, tuple[Notice, float]] = {}  # by name: the notice as first seen, and until when it is tried
    done: set[str] = set()
    failures = 0
    while True:
        began = time.monotonic()
        try:
            source = source or discover(metadata_url, rebalance)
            for notice in source.notices(wait=not pending):
                if notice.name not in done:
                    pending.setdefault(notice.name, (notice, max(notice.deadline, time.time() + GRACE)))
            failures = 0
            complaints.over("metadata", f"the metadata server at {metadata_url} answers again")
        except MetadataError as error:
            failures += 1
            complaints.say("metadata", f"{error} (trying on)")
        for name, (notice, until) in list(pending.items()):
            if pass_on(local, notice, until, complaints):
                done.add(name)
                del pending[name]
                if once:
                    return
        pause = max(every, min(every * 2 ** min(failures, 10), LONGEST_PAUSE)) if not pending else every
        time.sleep(max(0.0, pause - (time.monotonic() - began)))


def pass_on(local: LocalNode, notice: Notice, until: float, complaints: Complaints) -> bool:
    """Try to drain for ``notice``; true if that is done, or no use any more after ``until``."""
    try:
        local.drain(notice.cloud, notice.kind, notice.deadline)
    except (Unreachable, click.ClickException) as error:
        text = error.message if isinstance(error, click.ClickException) else f"Ray cannot be reached: {error}"
        if time.time() < until:
            complaints.say(notice.name, f"{notice.cloud} {notice.kind}: {text} (trying on)")
            return False
        say(f"{notice.cloud} {notice.kind}: given up: {text}")
    return True


@cli.command()
@click.option("--deadline", type=float, required=True, callback=check_seconds, help="Seconds that this node has left.")
@click.option("--wait", is_flag=True, help="Block until this node has no actors, at most until the deadline.")
@node_options
def now(deadline: float, wait: bool, address: str | None, node_id: str | None) -> None:
    """Drain this node at once, as a Kubernetes preStop hook does.

    Example: spot_notice.py now --deadline 30 --wait
    """
    local, complaints, until = LocalNode(address, node_id), Complaints(), time.time() + deadline
    while True:
        try:
            local.node_id = local.drain("none", "now", until)
            break
        except Unreachable as error:
            if time.time() >= until:
                raise click.ClickException(f"Ray cannot be reached: {error}") from error
            complaints.say("ray", f"Ray cannot be reached: {error} (trying on)")
            time.sleep(PAUSE)
    while wait and time.time() < until and local.busy(local.node_id):
        time.sleep(min(PAUSE, max(0.0, until - time.time())))


def main() -> int:
    """Run the command line; an error is one line on stderr."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        say(error.format_message())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
