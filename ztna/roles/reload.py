"""Reload: a role reads its files again while it runs, on SIGHUP or after a renewal.

`run_role` calls `reload_requests().ask()` on SIGHUP; the role's own `keep_reloading` reads all its
files, in a worker thread, and only if every one of them is good hands them to the role. The role
then changes everything without a checkpoint between, so that no packet meets half of a new
configuration. A broken file changes nothing; the log says which, where and why.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Generic, NoReturn, TypeVar

import attrs
import structlog
import trio

from ztna.config.deny_list import read_deny_list
from ztna.config.model import AgentConfig, AnyConfig, ConnectorConfig, IntermediateConfig
from ztna.core.identity import Role
from ztna.core.policy_document import SignedDocument
from ztna.errors import ConfigError, IdentityError, RemoteProtocolError, ZtnaError
from ztna.pki import Credentials, load_credentials
from ztna.policy_key import PolicyKeys, read_policy_keys, read_signed_policy
from ztna.roles.renewal import Renewal
from ztna.roles.signed_policy import FILE_NAME, PolicyFile, SignedPolicy

log = structlog.get_logger(__name__)

C = TypeVar("C", bound=AnyConfig)


@attrs.frozen(eq=False)
class NodeFiles(Generic[C]):
    """What a role runs by. denied_serials: certificates that are refused although valid.

    policy_keys: pinned here, if any are. policy: what an intermediate distributes and decides by.
    started_with: the first configuration, where this is a later one: keys of it that no reload
    brings are in force still.
    """

    config: C
    credentials: Credentials
    denied_serials: frozenset[int] = frozenset()
    policy_keys: PolicyKeys | None = None
    policy: SignedDocument | None = None
    started_with: C | None = None


ReadFiles = Callable[[], Awaitable[NodeFiles[C]]]
"""Reads a role's files again. Raises ConfigError or IdentityError."""


def read_files(config: C, role: Role) -> NodeFiles[C]:
    """The files that a configuration names. Raises ConfigError or IdentityError."""
    files = config.identity
    credentials = load_credentials(files.cert, files.key, files.ca, role=role)
    keys = None if config.policy_key is None else read_policy_keys(config.policy_key)
    policy = None
    if isinstance(config, IntermediateConfig) and config.policy_file is not None and keys:
        policy = read_signed_policy(config.policy_file)
        try:
            SignedPolicy(credentials.identity.trust_domain, keys).judge_untrusted(policy)
        except RemoteProtocolError as error:
            raise IdentityError(f"{config.policy_file}: {error}") from error
    return NodeFiles(
        config,
        credentials,
        frozenset() if config.deny_list is None else read_deny_list(config.deny_list),
        keys,
        policy,
    )


def load_policy(files: NodeFiles[AgentConfig] | NodeFiles[ConnectorConfig]) -> SignedPolicy | None:
    """A client's signed policy, with the document of before; None if no policy key is pinned."""
    if files.policy_keys is None:
        return None
    store = PolicyFile(files.config.state_dir / FILE_NAME)
    return SignedPolicy.load(files.credentials.identity.trust_domain, files.policy_keys, store)


def reader(read_config: Callable[[], C], role: Role) -> ReadFiles[C]:
    """Reads the configuration, and all that it names, in a worker thread."""

    async def read() -> NodeFiles[C]:
        return await trio.to_thread.run_sync(lambda: read_files(read_config(), role))

    return read


@attrs.define(eq=False)
class ReloadRequests:
    """Who asks for a reload, and whether the role listens."""

    served: bool = False
    _asked: trio.Event = attrs.field(factory=trio.Event)

    def ask(self) -> None:
        """Have the files read again. Several requests before that count as one."""
        if not self.served:
            log.warning("nothing is read again: this node runs without files that it could read")
        self._asked.set()

    async def wait(self) -> None:
        """Wait for the next request."""
        await self._asked.wait()
        self._asked = trio.Event()


_requests: trio.lowlevel.RunVar[ReloadRequests] = trio.lowlevel.RunVar("ztna reload requests")


def reload_requests() -> ReloadRequests:
    """The requests of this trio run."""
    try:
        return _requests.get()
    except LookupError:
        requests = ReloadRequests()
        _requests.set(requests)
        return requests


async def keep_reloading(
    files: NodeFiles[C], read: ReadFiles[C], apply: Callable[[NodeFiles[C], NodeFiles[C]], None]
) -> NoReturn:
    """Read again whenever asked, and renew the certificate in time, until cancelled.

    files: what the role runs by now. apply: takes what was and what is to be; it may raise
    ConfigError or IdentityError before it changes anything, and has no checkpoint.
    """
    requests = reload_requests()
    requests.served = True
    try:
        while True:
            async with trio.open_nursery() as nursery:
                renewal = Renewal(files.config.identity, files.credentials, requests.ask)
                nursery.start_soon(renewal.run)
                files = await _next_files(requests, files, read, apply)
                nursery.cancel_scope.cancel()
    finally:
        requests.served = False


async def _next_files(
    requests: ReloadRequests,
    files: NodeFiles[C],
    read: ReadFiles[C],
    apply: Callable[[NodeFiles[C], NodeFiles[C]], None],
) -> NodeFiles[C]:
    """Wait for a reload that succeeds."""
    while True:
        await requests.wait()
        try:
            fresh = await read()
            _check_same_node(files, fresh)
            apply(files, fresh)
        except ZtnaError as error:
            kind = type(error).__name__
            lines = [line.strip() for line in str(error).splitlines()]
            words = "; ".join(lines).replace(":; ", ": ")
            log.error("reload refused, the old files stay in force", kind=kind, error=words)
            continue
        until = f"{fresh.credentials.not_after:%Y-%m-%d %H:%M} UTC"
        log.info("reloaded", certificate_until=until, denied=len(fresh.denied_serials))
        return attrs.evolve(fresh, started_with=files.started_with or files.config)


def _check_same_node(old: NodeFiles[C], new: NodeFiles[C]) -> None:
    was, now = old.credentials.identity, new.credentials.identity
    if was != now:
        raise IdentityError(
            f"the certificate is for {now.uri}, and this node runs as {was.uri}: "
            "another identity needs a restart"
        )
    if type(old.config) is not type(new.config):
        raise ConfigError("the configuration is for another role")


def warn_of_restart(old: NodeFiles[Any], new: NodeFiles[Any], reloaded: frozenset[str]) -> None:
    """Tell which keys are not as they are in force, and a reload does not bring them."""
    was, now = old.started_with or old.config, new.config
    changed = [
        field.name
        for field in attrs.fields(type(was))
        if field.name not in reloaded and getattr(was, field.name) != getattr(now, field.name)
    ]
    if changed:
        log.warning("changed, but only a restart brings it into force", keys=", ".join(changed))
