"""The deployments on Ray Serve: the API, and the stages behind it; `build` is what a Serve config names."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from raydmd.config.recipe import Role
from raydmd.errors import PortableError, UserError, portable
from raydmd.runtime.ray_compat import keep_replica_at_home
from raydmd.serving.card import Offer, experts_of, open_served, read_offer
from raydmd.serving.contract import Unavailable
from raydmd.serving.log import write_log
from raydmd.serving.pipeline import TEACHER_PARTS, Link, Lost, Pipeline, stages_of
from raydmd.serving.reload import ask_stages, follow
from raydmd.serving.settings import Replicas, Serving, parse_serving, read_keys
from raydmd.serving.stage import Piece, Stage, StageBatch, StepPreview

GONE = (RayActorError, ObjectLostError, OwnerDiedError)
INLINE = 64 * 1024  # bytes of latents up to which they travel in the message; more go through the object store
CONNECTIONS = 10_000  # requests that an API replica talks with: who waits too long is refused by it, not by Serve


class StageReplica:
    """A `Stage` on Ray Serve. Large latents are left in the object store: only references pass through the API."""

    def __init__(self, serving: Serving, parts: tuple[str, ...], threads: int) -> None:
        keep_replica_at_home()
        write_log(serving.log_file)
        self.stage = Stage(serving, parts, threads)
        self._follower: asyncio.Task[None] | None = None

    async def run(self, stage_batch: StageBatch) -> Piece:
        """Do the stage's parts for a stage batch; see `Stage.run`."""
        self._follow()
        with _sent_errors():
            return _packed(await self.stage.run(await _unpacked(stage_batch)), stage_batch)

    async def watch(self, stage_batch: StageBatch) -> AsyncGenerator[StepPreview | Piece, None]:
        """Do as `run`, and yield each step before the piece."""
        self._follow()
        with _sent_errors():
            async for event in self.stage.watch(await _unpacked(stage_batch)):
                yield _packed(event, stage_batch) if isinstance(event, Piece) else event

    async def preview(self, stage_batch: StageBatch) -> tuple[bytes, ...]:
        """Return a picture of each of a stage batch's latents."""
        with _sent_errors():
            return await self.stage.preview(stage_batch)

    async def offers(self, served: str) -> list[Offer]:
        """Return what the weights that are here offer; see `Stage.offers`."""
        return await self.stage.offers(served)

    async def ready(self) -> None:
        """Return: it is there to be asked."""

    async def check_health(self) -> None:
        """Called by Serve from time to time, from the start."""
        self._follow()

    def _follow(self) -> None:
        serving = self.stage.serving
        if self._follower is None and serving.reload_seconds:
            self._follower = asyncio.create_task(follow(serving, self.stage.revisions[-1], self.stage.refresh))


@contextmanager
def _sent_errors() -> Iterator[None]:
    """Let errors out as the API's process can read them."""
    try:
        yield
    except Exception as error:
        if (sent := portable(error)) is error:
            raise
        raise sent from error


def _packed(piece: Piece, came: StageBatch) -> Piece:
    """Put what is large and goes on into the object store; conditions stay as they came."""
    if piece.files:
        return piece
    conditions = came.conditions or _kept(piece.stage_batch.conditions)
    return replace(
        piece, stage_batch=replace(piece.stage_batch, conditions=conditions, latents=_kept(piece.stage_batch.latents))
    )


def _kept(arrays: Any) -> Any:
    each = arrays.values() if isinstance(arrays, dict) else () if arrays is None else (arrays,)
    return ray.put(arrays) if sum(array.nbytes for array in each) > INLINE else arrays


async def _unpacked(stage_batch: StageBatch) -> StageBatch:
    changes: dict[str, Any] = {}
    for name in ("conditions", "latents"):
        if isinstance(value := getattr(stage_batch, name), ray.ObjectRef):
            changes[name] = await value
    return replace(stage_batch, **changes) if changes else stage_batch


class ServeLink:
    """A stage behind a deployment's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._stream = handle, handle.options(stream=True)

    async def run(self, stage_batch: StageBatch) -> Piece:
        """Do as `Stage.run`; cancelled, the replica hears of it."""
        return await self._call("run", stage_batch)

    async def preview(self, stage_batch: StageBatch) -> tuple[bytes, ...]:
        """Do as `Stage.preview`."""
        return await self._call("preview", stage_batch)

    async def offers(self, served: str) -> list[Offer]:
        """Do as `Stage.offers`, for one of its replicas."""
        offers: list[Offer] = await self._call("offers", served)
        return offers

    async def ready(self) -> None:
        """Return once a replica answers."""
        await self._call("ready")

    async def watch(self, stage_batch: StageBatch) -> AsyncGenerator[StepPreview | Piece, None]:
        """Do as `Stage.watch`."""
        events: Any = self._stream.watch.remote(stage_batch)
        try:
            async for event in events:
                yield event
        except Exception as error:
            raise _translated(error) from None
        finally:
            events.cancel()

    async def _call(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise _translated(error) from None


def _translated(error: Exception) -> Exception:
    """Return what a failed call means: `Lost` where another replica may do it, else the stage's own error."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, GONE) or isinstance(error, GONE):
        return Lost(str(cause))
    if isinstance(cause, DeploymentUnavailableError | BackPressureError):
        return Unavailable("the replicas that make pictures cannot be reached")
    if isinstance(cause, RayServeException):
        return Lost(str(cause))
    if not isinstance(cause, Exception):
        return error
    if isinstance(error, RayTaskError) and not isinstance(cause, PortableError):
        cause.add_note(f"in the stage's replica:\n{error.traceback_str}")  # for the log
    return cause


@serve.ingress()
class Api:
    """The HTTP side: stateless but for stored pictures and jobs, so that it scales apart from the networks.

    Args:
        serving: the settings.
        stages: their deployments by name.
        inline: stages that live in the API's own replicas: their parts by name.
        offer: what the run offered when it was deployed: what is told until the stages have said what they hold.
    """

    def __init__(
        self, serving: Serving, stages: dict[str, DeploymentHandle], inline: dict[str, tuple[str, ...]], offer: Offer
    ) -> None:
        keep_replica_at_home()
        write_log(serving.log_file)
        self.serving, threads = serving, serving.stages.expert.threads
        self.inline = {name: Stage(serving, parts, threads) for name, parts in inline.items()}
        links: dict[str, Link] = {name: ServeLink(handle) for name, handle in stages.items()}
        self.pipeline = Pipeline(serving, links | self.inline, offer)
        self._followers: list[asyncio.Task[None]] = []

    def __serve_build_asgi_app__(self) -> Any:
        """Return the app: called by Serve after the constructor."""
        from raydmd.serving.http.app import make_app

        return make_app(self.pipeline, self.serving)

    async def check_health(self) -> None:
        """Called by Serve from time to time, from the start."""
        serving = self.serving
        if not self._followers and serving.reload_seconds:
            ways = [follow(serving, stage.revisions[-1], stage.refresh) for stage in self.inline.values()]
            self._followers = [asyncio.create_task(way) for way in [*ways, ask_stages(serving, self.pipeline.refresh)]]


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application: ``args`` is a tree of `settings.Serving`.

    Raises:
        UserError: a wrong key or value, or a run that cannot be served.
    """
    return application(parse_serving(args, "args"))


def application(serving: Serving) -> serve.Application:
    """Build the application of settings.

    Raises:
        UserError: a run that cannot be served.
    """
    read_keys(serving)
    student = open_served(serving)
    offer = read_offer(serving, student)
    if not student.reloads:
        serving = serving.model_copy(update={"reload_seconds": 0.0})
    card, workers = offer.card, student.recipe.runtime.generator
    if card.kind == "video" and serving.api_replicas > 1:
        name = "expert" if serving.api == "inline" else "api"
        raise UserError(f"stages.{name}.max: {serving.api_replicas} API replicas, but a video's job is known to one "
                        f"alone; set it to 1{' or api to own' if name == 'expert' else ''}")  # fmt: skip
    names = stages_of(serving, experts_of(card))
    inline = names if serving.api == "inline" else {}
    if serving.teacher:
        names = names | {"teacher": TEACHER_PARTS}
    stages = {name: _stage(serving, name, parts, workers) for name, parts in names.items() if name not in inline}
    place, target = (serving.stages.expert, 2 * serving.max_batch) if inline else (serving.stages.api, 64)
    api = _deployment(Api).options(
        name="api", max_ongoing_requests=CONNECTIONS, **_scale(place, workers, target=target)
    )
    return api.bind(serving, stages, inline, offer)


def _stage(serving: Serving, name: str, parts: tuple[str, ...], workers: Role) -> serve.Application:
    kind: Replicas = getattr(serving.stages, "expert" if name.startswith("expert") else name)
    deployment = _deployment(StageReplica).options(
        name=name,
        max_ongoing_requests=max(serving.queue_samples, serving.max_batch),
        **_scale(kind, workers, target=2 * serving.max_batch),
    )
    return deployment.bind(serving, parts, kind.threads)


def _deployment(kind: type) -> serve.Deployment:
    made: Any = serve.deployment(kind)
    return made


def _scale(kind: Replicas, workers: Role, target: int) -> dict[str, Any]:
    """Return a deployment's options: what a replica needs, and how many there are.

    Args:
        kind: the stage's settings.
        workers: of the run's generator; they say what is not said here.
        target: requests of a replica, waiting or worked on, above which Serve adds one.
    """
    actor: dict[str, Any] = {
        "num_cpus": workers.cpus if kind.cpus is None else kind.cpus,
        "num_gpus": workers.gpus if kind.gpus is None else kind.gpus,
        "resources": kind.resources,
    }
    if kind.labels:
        actor["label_selector"] = kind.labels
    options: dict[str, Any] = {"ray_actor_options": actor}
    if kind.max > kind.min:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=kind.min, max_replicas=kind.max, target_ongoing_requests=target,
            upscale_delay_s=5.0, downscale_delay_s=60.0,
        )  # fmt: skip
    else:
        options["num_replicas"] = kind.min
    return options
