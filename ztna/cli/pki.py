"""`ztna pki`: the private CA, requests, certificates.

init -> request (on the node) -> issue (beside the CA) -> show -> renew (beside the CA). Keys are
made where they are used and never overwritten, but by `renew --key`; certificates are replaced when
they are renewed.
"""

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import rich_click as click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztna.authority import (
    LEAF_LIFETIME,
    Authority,
    IpAddress,
    Request,
    create_authority,
    make_request,
    read_request_untrusted,
    renewal_of,
)
from ztna.core.identity import Identity, Role, valid_name, valid_trust_domain
from ztna.errors import IdentityError, RemoteProtocolError, UsageError
from ztna.pki import (
    MALFORMED,
    alternative_names,
    certificate_pem,
    private_key_pem,
    read_certificates,
    read_file,
    renew_at,
    replace_key,
    trust_domain_of,
    write_new,
    write_public,
)

ROLES = click.Choice([str(role) for role in Role])
PATH = click.Path(path_type=Path)


def _ip(text: str) -> IpAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no IP address") from error


@click.group()
def pki() -> None:
    """Make the private CA, and certificates for intermediates, connectors and agents.

    \b
    Example:
      ztna pki init ca --trust-domain example.net
      ztna pki request agent laptop --ca ca.crt --out /etc/ztna
      ztna pki issue --ca ca --csr agent.csr
    """


@pki.command()
@click.argument("directory", type=PATH)
@click.option("--trust-domain", required=True, help="DNS name that all nodes' identities carry.")
def init(directory: Path, trust_domain: str) -> None:
    """Make a CA: DIRECTORY/ca.key, which stays there, and ca.crt, which every node gets.

    \b
    Example:
      ztna pki init ca --trust-domain example.net
    """
    authority = create_authority(directory, trust_domain, _now())
    until = authority.certificate.not_valid_after_utc
    click.echo(f"CA for {trust_domain}, valid until {until:%Y-%m-%d}")
    click.echo(f"  {directory / 'ca.crt'}  give it to every node")
    click.echo(f"  {directory / 'ca.key'}  keep it here, away from every intermediate; back it up")


@pki.command()
@click.argument("role", type=ROLES)
@click.argument("name")
@click.option("--dns", multiple=True, help="DNS name of an intermediate; may be repeated.")
@click.option(
    "--ip", "ips", type=_ip, metavar="ADDRESS", multiple=True, help="Address of an intermediate."
)
@click.option("--ca", type=PATH, help="ca.crt; tells the trust domain.")
@click.option("--trust-domain", help="The trust domain, where ca.crt is not at hand.")
@click.option("--out", type=PATH, default=Path(), help="Where ROLE.key and ROLE.csr go.")
def request(
    role: str,
    name: str,
    dns: tuple[str, ...],
    ips: tuple[IpAddress, ...],
    ca: Path | None,
    trust_domain: str | None,
    out: Path,
) -> None:
    """Make a key and a request for its certificate, on the node that will use them.

    \b
    Example:
      ztna pki request intermediate relay --dns relay.example.net \\
          --ca ca.crt --out /etc/ztna
    """
    if (ca is None) == (trust_domain is None):
        raise UsageError("give either --ca ca.crt or --trust-domain")
    domain = trust_domain or trust_domain_of(read_certificates(ca or Path())[0])
    key, csr = make_request(_identity(domain, role, name), dns, ips)
    write_new(out / f"{role}.key", private_key_pem(key), mode=0o600)
    write_public(out / f"{role}.csr", csr.public_bytes(serialization.Encoding.PEM))
    click.echo(f"{out / role}.key stays here.")
    click.echo(f"Have {out / role}.csr signed: ztna pki issue --ca DIR --csr {role}.csr")


@pki.command()
@click.argument("role", type=ROLES, required=False)
@click.argument("name", required=False)
@click.option("--ca", type=PATH, required=True, help="Directory that `pki init` made.")
@click.option("--csr", type=PATH, help="The request to sign.")
@click.option("--dns", multiple=True, help="DNS name of an intermediate; may be repeated.")
@click.option(
    "--ip", "ips", type=_ip, metavar="ADDRESS", multiple=True, help="Address of an intermediate."
)
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=LEAF_LIFETIME.days,
    show_default=True,
    help="Lifetime; never longer than the CA's.",
)
@click.option("--out", type=PATH, help="Where the files go; by default beside the CSR, or here.")
def issue(
    role: str | None,
    name: str | None,
    ca: Path,
    csr: Path | None,
    dns: tuple[str, ...],
    ips: tuple[IpAddress, ...],
    days: int,
    out: Path | None,
) -> None:
    """Sign a request; or, for laboratories, make key and certificate in one place.

    \b
    Example:
      ztna pki issue --ca ca --csr agent.csr
      ztna pki issue --ca ca agent laptop --out laptop    (laboratory only)
    """
    authority = Authority.load(ca)
    lifetime = datetime.timedelta(days=days)
    if csr is not None:
        if role or name or dns or ips:
            raise UsageError("with --csr the request says role, name, DNS names and addresses")
        try:
            asked = read_request_untrusted(read_file(csr))
        except RemoteProtocolError as error:
            raise IdentityError(f"{csr}: {error}") from error
        path = (out or csr.parent) / f"{csr.stem}.crt"
        certificate = authority.issue(asked, _now(), lifetime)
    elif role and name:
        directory = out or Path()
        path = directory / f"{role}.crt"
        identity = _identity(authority.trust_domain, role, name)
        key, _ = make_request(identity, dns, ips)
        asked = Request(identity, key.public_key(), dns, ips)
        certificate = authority.issue(asked, _now(), lifetime)
        roots = directory / "ca.crt"
        if roots.exists() and authority.certificate not in read_certificates(roots):
            raise IdentityError(f"{roots} is of another CA: name another --out")
        write_new(directory / f"{role}.key", private_key_pem(key), mode=0o600)
        if not roots.exists():
            write_public(roots, certificate_pem(authority.certificate))
        click.echo(
            "Warning: this key was made beside the CA and has to travel. For more than a "
            "laboratory use `ztna pki request` on the node.",
            err=True,
        )
    else:
        raise UsageError("say what to issue: --csr FILE, or ROLE and NAME")
    write_public(path, certificate_pem(certificate))
    click.echo(
        f"{path}: {asked.identity}, valid until "
        f"{certificate.not_valid_after_utc:%Y-%m-%d}, renew from {renew_at(certificate):%Y-%m-%d}"
    )


@pki.command()
@click.option("--ca", type=PATH, required=True, help="Directory that `pki init` made.")
@click.option("--cert", type=PATH, required=True, help="The certificate; it may have expired.")
@click.option(
    "--key", type=PATH, help="Make a new key, too, and write it here; the old one is replaced."
)
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=LEAF_LIFETIME.days,
    show_default=True,
    help="Lifetime from now; never longer than the CA's.",
)
@click.option("--out", type=PATH, help="Where the certificate goes; by default into --cert.")
def renew(ca: Path, cert: Path, key: Path | None, days: int, out: Path | None) -> None:
    """Issue a certificate once more, for the same identity, names and key.

    The node takes it on SIGHUP. A node renews by itself where its file has "identity": {"renew"}.

    \b
    Example:
      ztna pki renew --ca ca --cert agent.crt
    """
    authority = Authority.load(ca)
    new_key = ec.generate_private_key(ec.SECP256R1()) if key is not None else None
    old, *_ = read_certificates(cert)
    try:
        asked = renewal_of(
            old,
            authority.certificate,
            None if new_key is None else new_key.public_key(),
        )
    except IdentityError as error:
        raise IdentityError(f"{cert}: {error}") from error
    certificate = authority.issue(asked, _now(), datetime.timedelta(days=days))
    path = out or cert
    if key is not None and new_key is not None:
        replace_key(key, private_key_pem(new_key))
    write_public(path, certificate_pem(certificate))
    click.echo(
        f"{path}: {asked.identity}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}, "
        f"renew from {renew_at(certificate):%Y-%m-%d}"
    )


@pki.command()
@click.argument("file", type=PATH)
def show(file: Path) -> None:
    """Say in words what the certificates in FILE, or a request, are for.

    \b
    Example:
      ztna pki show /etc/ztna/agent.crt
    """
    pem = read_file(file)
    if b"PRIVATE KEY-----" in pem and b"-----BEGIN CERTIFICATE" not in pem:
        raise UsageError(f"{file} is a private key: give the certificate beside it")
    try:
        if b"-----BEGIN CERTIFICATE REQUEST" in pem:
            described = [list(_describe_request(read_request_untrusted(pem)))]
        else:
            described = [list(describe(c, _now())) for c in read_certificates(file)]
    except (RemoteProtocolError, *MALFORMED) as error:
        raise IdentityError(f"{file}: {error}") from error
    for number, lines in enumerate(described):
        if number:
            click.echo()
        for label, words in lines:
            click.echo(f"{label + ':':<14}{words}")


def describe(certificate: x509.Certificate, now: datetime.datetime) -> Iterator[tuple[str, str]]:
    """What a certificate says, as pairs of label and words. Raises IdentityError or MALFORMED."""
    names = alternative_names(certificate)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    yield "subject", certificate.subject.rfc4514_string() or "none"
    yield "issuer", certificate.issuer.rfc4514_string()
    yield "names", _list([*uris, *_hosts(names)])
    yield "role", _role(certificate, uris)
    yield "may be", _uses(certificate)
    yield "valid from", f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    yield "valid until", f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    yield "status", _status(certificate, now)
    yield "key", _key_type(certificate.public_key())
    yield "serial", f"{certificate.serial_number:x}"
    yield "SHA-256", certificate.fingerprint(hashes.SHA256()).hex(":")


def _describe_request(asked: Request) -> Iterator[tuple[str, str]]:
    yield "request for", asked.identity.uri
    yield "names", _list([*asked.dns, *map(str, asked.ips)])
    yield "role", asked.identity.role
    yield "key", _key_type(asked.public_key)


def _role(certificate: x509.Certificate, uris: list[str]) -> str:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if basic.ca:
            return "certification authority"
    except x509.ExtensionNotFound:
        pass
    try:
        return Identity.parse_untrusted(uris[0]).role if len(uris) == 1 else "none: no SPIFFE ID"
    except RemoteProtocolError as error:
        return f"none: {error}"


def _uses(certificate: x509.Certificate) -> str:
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return "not limited (no extended key usage)"
    known = {ExtendedKeyUsageOID.SERVER_AUTH: "server", ExtendedKeyUsageOID.CLIENT_AUTH: "client"}
    return _list([known.get(use, use.dotted_string) for use in uses])


def _status(certificate: x509.Certificate, now: datetime.datetime) -> str:
    left = certificate.not_valid_after_utc - now
    if left < datetime.timedelta(0):
        return f"expired {_days(-left)} ago"
    if now < certificate.not_valid_before_utc:
        return f"not yet valid: starts in {_days(certificate.not_valid_before_utc - now)}"
    renewal = renew_at(certificate)
    advice = "renew now" if now >= renewal else f"renew from {renewal:%Y-%m-%d}"
    return f"valid, {_days(left)} left; {advice}"


def _days(span: datetime.timedelta) -> str:
    hours = int(span.total_seconds() // 3600)
    return f"{hours // 24} days" if hours >= 48 else f"{hours} hours"


def _key_type(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.removeprefix("_").removesuffix("PublicKey")


def _hosts(names: x509.SubjectAlternativeName) -> list[str]:
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _list(words: list[str]) -> str:
    return ", ".join(words) or "none"


def _identity(trust_domain: str, role: str, name: str) -> Identity:
    if not valid_trust_domain(trust_domain):
        raise UsageError(f"{trust_domain!r} is no trust domain, such as example.net")
    if not valid_name(name):
        raise UsageError(
            f"{name!r} is no name: letters, digits, dots, dashes and underscores, at most 63"
        )
    return Identity(trust_domain, Role(role), name)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
