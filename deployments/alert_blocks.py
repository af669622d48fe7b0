"""The channels of alerts, as Prefect blocks: webhook, Slack-compatible webhook, mail.

The Prefect server sends through them from its own process, and finds these classes by the entry point
`prefect.collections` of this package: nothing heavy may be imported here. They are blocks of our own because
Prefect's cannot do it: none sends mail over SMTP, its custom webhook tells the address in its errors, which the
server logs, and its Slack block takes addresses of slack.com only.
"""

from __future__ import annotations

import asyncio
import smtplib
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import httpx
from prefect.blocks.abstract import NotificationBlock, NotificationError
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from configs.alerts import AlertMessage

SEND_SECONDS = 15.0
_PAUSES = (1.0, 3.0)  # before another attempt, if the receiver could not be reached at all
_SHOWN = 300  # characters of an answer that are told
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Security = Literal["starttls", "ssl", "none"]


class _NotReached(Exception):
    """Nothing was sent: it can be tried again without telling anything twice."""


class AlertChannel(NotificationBlock, ABC):  # ABC stands here by itself: Prefect registers no such class
    """What a channel is: something that sends one message and says what came back."""

    kind: ClassVar[str]

    async def notify(self, body: str, subject: str | None = None) -> None:
        """Send the message that the automation has made; for Prefect's server. Raises NotificationError.

        An empty one says that the run is none that this channel is told of: `deployments.alerts` explains why.
        """
        if not body:
            return
        await asyncio.to_thread(deliver, self, body, subject)

    @abstractmethod
    def _send(self, subject: str, text: str, payload: dict[str, Any]) -> str:
        """Send once, and say what the receiver answered. Raises _NotReached or NotificationError."""

    @abstractmethod
    def _target(self) -> str:
        """Where it sends to, as far as everybody may know it."""


def deliver(channel: AlertChannel, body: str, subject: str | None = None) -> str:
    """Send `body`, the JSON of an AlertMessage or plain text; returns what the receiver answered.

    A receiver that cannot be reached is tried three times. Raises NotificationError, never with a secret in it.
    """
    try:
        message = AlertMessage.model_validate_json(body)
        parts = (message.subject(), message.text(), message.payload())
    except ValidationError:  # an automation that somebody has made on the page: its words as they are
        parts = (subject or "Tuneline", body, {"text": f"{subject}\n{body}" if subject else body})
    for pause in (*_PAUSES, None):
        try:
            return channel._send(*parts)
        except _NotReached as error:
            if pause is None:
                raise NotificationError(f"the receiver cannot be reached: {error}") from None
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def target_of(channel: AlertChannel) -> str:
    """Where a channel sends to, without what is secret of it."""
    return channel._target()


# --- webhooks ----------------------------------------------------------------------------------------------


class _Hook(AlertChannel, ABC):
    url: SecretStr = Field(
        title="Address", description="http(s) address that is posted to; it is a secret, whoever has it can post."
    )

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: SecretStr) -> SecretStr:
        try:
            parts = urlsplit(value.get_secret_value())
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("this is no address to post to: http://… or https://… is needed")
        return value

    def _target(self) -> str:
        parts = urlsplit(self.url.get_secret_value())
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}/…"

    def _post(self, payload: dict[str, Any]) -> str:
        try:
            with httpx.Client(timeout=SEND_SECONDS) as client:
                answer = client.post(self.url.get_secret_value(), json=payload)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NotReached(_plain(error, self.url)) from None
        # Its words may name the address: never chained, because Prefect logs the whole chain.
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotificationError(f"the message could not be sent: {_plain(error, self.url)}") from None
        told = f"{answer.status_code} {_plain(answer.text[:_SHOWN], self.url)}".strip()
        if not answer.is_success:
            raise NotificationError(f"the receiver refused the message: {told}")
        return told


class WebhookAlert(_Hook):
    """A webhook that gets every alert as JSON."""

    _block_type_name = "Tuneline webhook alert"
    _block_type_slug = "tuneline-webhook-alert"
    _description = "Posts the alerts of trains to an address, as JSON."
    kind = "webhook"

    def _send(self, subject: str, text: str, payload: dict[str, Any]) -> str:
        return self._post(payload)


class SlackAlert(_Hook):
    """A Slack-compatible webhook (Slack, Mattermost, Rocket.Chat …): JSON with `text`."""

    _block_type_name = "Tuneline Slack alert"
    _block_type_slug = "tuneline-slack-alert"
    _description = "Posts the alerts of trains to a Slack-compatible webhook."
    kind = "slack"

    def _send(self, subject: str, text: str, payload: dict[str, Any]) -> str:
        # What Slack reads as markup: a `<!channel>` in the text of an error would call everybody.
        plain = f"{subject}\n{text}".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return self._post({"text": plain})


# --- mail --------------------------------------------------------------------------------------------------


class MailAlert(AlertChannel):
    """Mail over SMTP; certificates are always checked."""

    _block_type_name = "Tuneline mail alert"
    _block_type_slug = "tuneline-mail-alert"
    _description = "Mails the alerts of trains."
    kind = "mail"

    host: str = Field(min_length=1, title="SMTP server", description="Name of the server that takes the mail.")
    port: int = Field(ge=1, le=65535, title="Port", description="587 for STARTTLS, 465 for SSL, 25 for neither.")
    security: Security = Field(default="starttls", title="Security", description="How the connection is secured.")
    sender: str = Field(title="From", description="Address that the mail comes from.")
    recipients: list[str] = Field(min_length=1, title="To", description="Addresses that it goes to.")
    username: str | None = Field(default=None, title="User", description="User at the server; empty: no login.")
    password: SecretStr | None = Field(default=None, title="Password", description="Password of that user.")

    @field_validator("sender", "recipients")
    @classmethod
    def _are_addresses(cls, value: str | list[str]) -> str | list[str]:
        for address in [value] if isinstance(value, str) else value:
            name, at, host = address.rpartition("@")
            if not (name and at and host) or any(sign.isspace() or sign in ",;<>" for sign in address):
                raise ValueError(f"{address!r} is no mail address: NAME@HOST is needed")
        return value

    @model_validator(mode="after")
    def _login(self) -> MailAlert:
        if (self.username is None) != (self.password is None):
            raise ValueError("a user and a password belong together: one of them is missing")
        if self.password is not None and self.security == "none" and self.host not in _LOOPBACK:
            raise ValueError("a password is not sent over the network in clear: use starttls or ssl")
        return self

    def _target(self) -> str:
        return f"{', '.join(self.recipients)} through {self.host}:{self.port} ({self.security})"

    def _send(self, subject: str, text: str, payload: dict[str, Any]) -> str:
        message = EmailMessage()
        message["Subject"] = " ".join(subject.split())
        message["From"] = self.sender
        message["To"] = ", ".join(self.recipients)
        message["Date"] = formatdate(localtime=True)
        message["Message-ID"] = make_msgid(domain=self.sender.rpartition("@")[2])
        message.set_content(text)
        try:
            refused = self._with_server(lambda server: server.send_message(message))
        except (smtplib.SMTPException, OSError) as error:
            raise NotificationError(f"the mail was not taken: {_plain(error, self.password)}") from None
        if refused:
            raise NotificationError(f"the mail was not taken for {', '.join(refused)}: {refused}")
        return f"taken by {self.host} for {', '.join(self.recipients)}"

    def _with_server(self, work: Callable[[smtplib.SMTP], dict[str, Any]]) -> dict[str, Any]:
        context = ssl.create_default_context()
        try:
            server: smtplib.SMTP = (
                smtplib.SMTP_SSL(self.host, self.port, timeout=SEND_SECONDS, context=context)
                if self.security == "ssl"
                else smtplib.SMTP(self.host, self.port, timeout=SEND_SECONDS)
            )
        except ssl.SSLError:
            raise
        except OSError as error:
            raise _NotReached(_plain(error, self.password)) from None
        with server:
            if self.security == "starttls":
                server.starttls(context=context)
            if self.username is not None and self.password is not None:
                server.login(self.username, self.password.get_secret_value())
            return work(server)


def _plain(error: Exception | str, secret: SecretStr | None) -> str:
    """The words of an error or an answer, without the secret."""
    text = str(error) or type(error).__name__
    hidden = secret.get_secret_value() if secret is not None else ""
    return text.replace(hidden, "…") if hidden else text


CHANNEL_TYPES: tuple[type[AlertChannel], ...] = (WebhookAlert, SlackAlert, MailAlert)
