"""`ztna policy`: the signed policy, from its key to its words.

init once, beside the CA -> edit policy.json -> sign -> check -> the intermediate's policy_file and
SIGHUP. Each signed policy has a higher serial than the one before; nodes refuse to go back.
"""

import datetime
import json
from pathlib import Path

import rich_click as click

from ztna.cli.config import guess_role
from ztna.cli.policy_draft import Draft, describe, notes, parse_grant, parse_service, render
from ztna.cli.text import printable
from ztna.config.document import read_document
from ztna.core.identity import valid_trust_domain
from ztna.core.policy_document import (
    MAX_SERIAL,
    PolicyDocument,
    SignedDocument,
    format_time,
    parse_policy_untrusted,
)
from ztna.errors import ConfigError, IdentityError, RemoteProtocolError, UsageError
from ztna.pki import read_certificates, read_file, trust_domain_of, write_new, write_public
from ztna.policy_key import (
    MAX_SIGNED_FILE,
    NotSignedError,
    create_policy_key,
    read_policy_key,
    read_policy_keys,
    sign_policy,
)

PATH = click.Path(path_type=Path)
LIFETIME = datetime.timedelta(days=90)
"""Our choice, that of certificates: a withheld policy ends within it."""


@click.group()
def policy() -> None:
    """Say who may reach what, signed: a hostile intermediate cannot change it.

    \b
    Example:
      ztna policy init policy --ca ca.crt --from intermediate.json --from agent.json
      ztna policy sign policy/policy.json
      ztna policy show policy/policy.signed
    """


@policy.command()
@click.argument("directory", type=PATH)
@click.option("--ca", type=PATH, help="ca.crt; tells the trust domain.")
@click.option("--trust-domain", help="The trust domain, where ca.crt is not at hand.")
@click.option(
    "--from",
    "files",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="intermediate.json for its rules, agent.json or connector.json for addresses; repeatable.",
)
@click.option(
    "--service",
    "services",
    multiple=True,
    metavar="ID[@ADDRESS][:PORT][/tcp|udp]",
    help="A service; without an address the next free one is chosen. Repeatable.",
)
@click.option(
    "--reach", multiple=True, metavar="WHO=ID[,ID...]", help="An agent's right; repeatable."
)
@click.option(
    "--provide", multiple=True, metavar="WHO=ID[,ID...]", help="A connector's; repeatable."
)
def init(
    directory: Path,
    ca: Path | None,
    trust_domain: str | None,
    files: tuple[Path, ...],
    services: tuple[str, ...],
    reach: tuple[str, ...],
    provide: tuple[str, ...],
) -> None:
    """Make a policy key and a first policy in DIRECTORY, away from every intermediate.

    \b
    Examples:
      ztna policy init policy --ca ca.crt --from intermediate.json --from agent.json
      ztna policy init policy --trust-domain example.net \\
          --service web-app@10.100.0.2:443/tcp \\
          --reach agent/laptop=web-app --provide connector/home=web-app
    """
    if (ca is None) == (trust_domain is None):
        raise UsageError("give either --ca ca.crt or --trust-domain")
    domain = trust_domain or trust_domain_of(read_certificates(ca or Path())[0])
    if not valid_trust_domain(domain):
        raise UsageError(f"{domain!r} is no trust domain, such as example.net")
    draft = Draft(domain)
    for text in services:
        service_id, keys = parse_service(text)
        draft.add_service(service_id, "option --service", **keys)
    for file in files:
        document = read_document(file)
        draft.add_file(guess_role(document), document)
    for text in reach:
        who, ids = parse_grant("--reach", text)
        draft.add_rule(who, services=ids)
    for text in provide:
        who, ids = parse_grant("--provide", text)
        draft.add_rule(who, provides=ids)
    chosen = list(draft.choose_addresses())
    data = render(draft.fields(_now(), LIFETIME))
    try:
        parse_policy_untrusted(data)
    except RemoteProtocolError as error:
        raise ConfigError(f"files and options together make no policy: {error}") from error
    create_policy_key(directory)
    write_new(directory / "policy.json", data, mode=0o644)
    click.echo(f"{directory / 'policy.key'}   keep it here, away from every intermediate")
    click.echo(f'{directory / "policy.pub"}   give it to every node, as "policy_key" in its file')
    click.echo(
        f"{directory / 'policy.json'}  edit it, then: ztna policy sign {directory}/policy.json"
    )
    for service_id, address in chosen:
        click.echo(f"{service_id} has no address in what was given; {address} was chosen")


@policy.command()
@click.argument("file", type=PATH)
@click.option("--key", type=PATH, help="The policy key; by default policy.key beside FILE.")
@click.option("--out", type=PATH, help="The signed policy; by default FILE with .signed.")
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=LIFETIME.days,
    show_default=True,
    help="Lifetime: nodes allow nothing after it.",
)
def sign(file: Path, key: Path | None, out: Path | None, days: int) -> None:
    """Check FILE, raise its serial, set its dates, write it back, and sign it.

    Put the signed policy where the intermediate's "policy_file" is, and send it SIGHUP.

    \b
    Example:
      ztna policy sign policy/policy.json
    """
    private = read_policy_key(key or file.parent / "policy.key")
    target = out or file.with_suffix(".signed")
    if target == file:
        raise UsageError(f"{file} is what is to be signed: name another --out")
    draft = read_file(file, limit=MAX_SIGNED_FILE)
    policy = _parse(file, draft)
    serial = max(policy.serial, _serial_of_before(target)) + 1
    if serial > MAX_SERIAL:
        raise ConfigError(f"{file}: $.serial: {policy.serial} leaves no greater one")
    now = _now()
    fields = {
        **json.loads(draft),
        "serial": serial,
        "issued": format_time(now),
        "expires": format_time(now + datetime.timedelta(days=days)),
    }
    data = render(fields)
    policy = _parse(file, data)
    write_public(target, sign_policy(private, data).to_bytes())
    write_public(file, data)
    click.echo(f"{target}: {_title(policy)}")
    _tell_notes(policy)


@policy.command()
@click.argument("file", type=PATH)
@click.option("--key", type=PATH, help="policy.pub; by default that beside FILE.")
def check(file: Path, key: Path | None) -> None:
    """Say whether FILE is a policy that nodes would take, or all right to sign.

    The exit code is 0 if it is, 3 if it says something wrong, 4 if its signature is not that of the
    key, or it has expired.

    \b
    Example:
      ztna policy check policy/policy.signed
    """
    policy, signed_by = _read(file, key)
    if signed_by is not None and policy.expires <= _now():
        raise IdentityError(
            f"{file}: expired on {policy.expires:%Y-%m-%d %H:%M} UTC: sign it again"
        )
    click.echo(f"{file}: {_title(policy)}")
    _tell_notes(policy)
    click.echo(f"signed by {signed_by}" if signed_by is not None else "not signed yet")


@policy.command()
@click.argument("file", type=PATH)
@click.option("--key", type=PATH, help="policy.pub; by default that beside FILE.")
def show(file: Path, key: Path | None) -> None:
    """Say in words who may reach what, by FILE, a signed policy or one that is not signed yet.

    \b
    Example:
      ztna policy show policy/policy.signed
    """
    policy, signed_by = _read(file, key)
    ends = "expired" if signed_by is not None and policy.expires <= _now() else "until"
    lines = [_title(policy, ends), *describe(policy)]
    lines.append(f"signed by {signed_by}" if signed_by is not None else "not signed yet")
    click.echo(printable("\n".join(lines)))


def _read(file: Path, key: Path | None) -> tuple[PolicyDocument, Path | None]:
    """A policy, and the key that has signed it; None for one that is not signed yet."""
    data = read_file(file, limit=MAX_SIGNED_FILE)
    try:
        signed = SignedDocument.parse_untrusted(data)
    except RemoteProtocolError:
        if key is not None:
            raise IdentityError(f"{file} is not signed (ztna policy sign does it)") from None
        return _parse(file, data), None
    public = key or file.parent / "policy.pub"
    try:
        read_policy_keys(public).verify(signed)
    except IdentityError as error:
        if key is None and isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(f"{error}: name the public key by --key") from error
        raise
    except NotSignedError:
        words = f"is not signed by the key in {public}, or was changed since"
        raise IdentityError(f"{file} {words}") from None
    return _parse(file, signed.document), public


def _parse(file: Path, data: bytes) -> PolicyDocument:
    try:
        return parse_policy_untrusted(data)
    except RemoteProtocolError as error:
        raise ConfigError(f"{file}: {error}") from error


def _serial_of_before(file: Path) -> int:
    """The serial of the signed policy that is about to be replaced; 0 if there is none."""
    try:
        signed = SignedDocument.parse_untrusted(read_file(file, limit=MAX_SIGNED_FILE))
        return parse_policy_untrusted(signed.document).serial
    except IdentityError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return 0
        raise
    except RemoteProtocolError as error:
        words = "is there and is no signed policy: name another --out"
        raise IdentityError(f"{file} {words} ({error})") from error


def _title(policy: PolicyDocument, until: str = "until") -> str:
    return (
        f"policy {policy.serial} for {policy.trust_domain}, of {policy.issued:%Y-%m-%d %H:%M} UTC, "
        f"{until} {policy.expires:%Y-%m-%d %H:%M} UTC"
    )


def _tell_notes(policy: PolicyDocument) -> None:
    for note in notes(policy):
        click.echo(printable(f"note: {note}"))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
