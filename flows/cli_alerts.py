"""`tuneline alerts`: the channels that tell how trains end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from flows.printing import print_fields, print_json, print_table

if TYPE_CHECKING:
    from deployments.alert_blocks import AlertChannel

URL_VARIABLE = "TUNELINE_ALERT_URL"
PASSWORD_VARIABLE = "TUNELINE_ALERT_PASSWORD"  # noqa: S105 - the name of a variable
_PORTS = {"starttls": 587, "ssl": 465, "none": 25}

app = typer.Typer(help="Channels that tell how trains end. Webhook, Slack-compatible, mail.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the channel.")]


@app.command()
def add(
    name: Name,
    webhook: Annotated[bool, typer.Option("--webhook", help="Post JSON to an address.")] = False,
    slack: Annotated[bool, typer.Option("--slack", help="Post to a Slack-compatible webhook.")] = False,
    mail: Annotated[bool, typer.Option("--mail", help="Send mail over SMTP.")] = False,
    smtp_host: Annotated[str | None, typer.Option(help="Mail: the SMTP server.")] = None,
    smtp_port: Annotated[
        int | None, typer.Option(help="Mail: its port; by default 587, 465 or 25.", min=1, max=65535)
    ] = None,
    security: Annotated[str, typer.Option(help="Mail: starttls, ssl or none.")] = "starttls",
    sender: Annotated[str | None, typer.Option("--from", help="Mail: the address it comes from.")] = None,
    to: Annotated[list[str], typer.Option(metavar="ADDRESS", help="Mail: an address it goes to; repeatable.")] = [],  # noqa: B006
    username: Annotated[str | None, typer.Option(help="Mail: user at the server; by default no login.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Change the channel of this name.")] = False,
) -> None:
    """Register a channel.

    Its address (TUNELINE_ALERT_URL) or password (TUNELINE_ALERT_PASSWORD) is asked for unless the environment has it:
    what stands in a command can be read by everybody on the host.
    """
    if [webhook, slack, mail].count(True) != 1:
        raise UserError("say what the channel is", expected="exactly one of --webhook, --slack and --mail")
    if not mail:
        given = {
            "--smtp-host": smtp_host,
            "--smtp-port": smtp_port,
            "--from": sender,
            "--to": to,
            "--username": username,
        }
        for option, value in given.items():
            if value:
                raise UserError("this belongs to mail only", field=option, value=value, mend="leave it out")
    channel = _hook(slack) if not mail else _mail(smtp_host, smtp_port, security, sender, to, username)
    _connect()
    from deployments.alerts import add_channel

    added = add_channel(name, channel, replace=replace)
    print_fields({"channel": added.name, "kind": added.kind, "to": added.target})
    print(f"`tuneline alerts test {name}` sends a message; a train names it: alerts: [{{to: {name}, on: [failed]}}]")


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every channel, without its secrets."""
    _connect()
    from deployments.alerts import list_channels

    channels = list_channels()
    if json_:
        print_json([item.model_dump() for item in channels])
        return
    rows = [(item.name, item.kind, item.target) for item in channels]
    print_table(("Channel", "Kind", "To"), rows, "no channels; `tuneline alerts add NAME --webhook` registers one")


@app.command()
def test(name: Name) -> None:
    """Send a test message, and say what came back."""
    _connect()
    from deployments.alerts import test_channel

    print(f"{name}: {test_channel(name)}")


@app.command()
def remove(name: Name) -> None:
    """Take a channel away; trains that name it are refused from then on."""
    _connect()
    from deployments.alerts import remove_channel

    remove_channel(name)
    print(f"{name} is removed")


def _connect() -> None:
    """Channels are kept by the Prefect server; without a standing one, an embedded one on the same database."""
    from flows.cli_trains import embedded

    embedded()
    from deployments.guard import start_embedded_server

    start_embedded_server()


def _hook(slack: bool) -> AlertChannel:
    url = _secret(URL_VARIABLE, "Address to post to")
    from deployments.alert_blocks import SlackAlert, WebhookAlert

    return _checked(SlackAlert if slack else WebhookAlert, {"url": url}, URL_VARIABLE)


def _mail(
    host: str | None, port: int | None, security: str, sender: str | None, to: list[str], username: str | None
) -> AlertChannel:
    for option, value in {"--smtp-host": host, "--from": sender, "--to": to}.items():
        if not value:
            raise UserError("mail needs a server, a sender and somebody to go to", field=option, mend="give it")
    if security not in _PORTS:
        raise UserError("impossible value", field="--security", value=security, expected="starttls, ssl or none")
    values: dict[str, Any] = {
        "host": host,
        "port": port or _PORTS[security],
        "security": security,
        "sender": sender,
        "recipients": to,
    }
    if username is not None:
        values |= {"username": username, "password": _secret(PASSWORD_VARIABLE, f"Password of {username}")}
    from deployments.alert_blocks import MailAlert

    return _checked(MailAlert, values, "--mail")


def _checked(channel: type[AlertChannel], values: dict[str, Any], field: str) -> AlertChannel:
    """The channel. Raises UserError that shows what is wrong with it, and no value: it may be the secret."""
    from pydantic import ValidationError

    try:
        return channel(**values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or field
        raise UserError(first["msg"].removeprefix("Value error, "), field=where) from None


def _secret(variable: str, prompt: str) -> str:
    given = os.environ.get(variable)
    if given:
        return given
    if not sys.stdin.isatty():
        raise UserError(
            "there is nobody to ask for the secret",
            field=variable,
            mend=f"set {variable} in the environment, or run this in a terminal",
        )
    return str(typer.prompt(prompt, hide_input=True))
