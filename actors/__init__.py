"""The only folder that imports ray, which reads how to authenticate once, when it is first imported.

So it is settled here: token authentication, unless RAY_AUTH_MODE says otherwise (`placement.connect` refuses what
Ray would take for `disabled`). A process that will start a cluster of its own, rather than join one, gets a token that
lives in its environment only.
"""

import os
import secrets
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "token")
if (
    os.environ["RAY_AUTH_MODE"] == "token"
    and not os.environ.get("RAY_ADDRESS")
    and "RAY_AUTH_TOKEN_PATH" not in os.environ
    and not (Path.home() / ".ray" / "auth_token").exists()
):
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
