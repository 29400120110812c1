"""What facts mean for a job, in lines: OK, WARN or FAIL, what was found, and the mend. Pure.

A node is a dict: what nodefacts.gather gave, and from Ray `id`, `name`, `head`, `cpu`, `gpu`, `free_cpu`, `free_gpu`,
`store_bytes`, `skew_s`; `error` stands for all of it where a node did not answer. FAIL: the job would not run, or
strangers may run code. WARN: it runs, worse than it could. health.py judges the nodes themselves, verdict.py the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

Node = dict[str, Any]
Level = Literal["OK", "WARN", "FAIL"]

DISK_BYTES = 2 * 2**30  # two checkpoints of 85 million parameters, 12 bytes each with AdamW's state
SHOWN = 4  # nodes that are named
ANSWER = "mend the nodes first"
USE_TOKENS = (
    "on every node, before ray start: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE (ray get-auth-token "
    "--generate makes one)"
)


class Check(NamedTuple):
    """One line."""

    name: str
    level: Level
    found: str
    mend: str = ""


def mask(text: str) -> str:
    """A text without what stands for a secret in addresses: user and password, and what follows the ?."""
    text = re.sub(r"(?<=://)[^/\s@]*@", "***@", text)
    return re.sub(r"(://[^\s?]*\?)[^\s,;:]+", r"\1***", text)


def gb(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def count(number: float, what: str) -> str:
    """1 CPU, 2 CPUs."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def names(nodes: Iterable[Node]) -> str:
    """Nodes by name, not too many."""
    found = [node["name"] for node in nodes]
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def worst(name: str, problems: list[Check], ok: str) -> Check:
    """One line of several of one kind: the worst level, all findings, the first mend of that level."""
    if not problems:
        return Check(name, "OK", ok)
    level: Level = "FAIL" if any(p.level == "FAIL" for p in problems) else "WARN"
    first = [p for p in problems if p.level == level]
    rest = [p for p in problems if p.level != level]
    mends = list(dict.fromkeys(p.mend for p in first))
    return Check(name, level, "; ".join(p.found for p in (*first, *rest)), "; ".join(mends))


def each(name: str, nodes: list[Node], ok: str, look: Callable[[Node], tuple[Level, str, str] | None]) -> Check:
    """One line of what is found on each node; nodes with the same finding are named together.

    Args:
        name: of the check.
        nodes: those that answered.
        ok: what is said if nothing is found.
        look: level, finding and mend, or None.
    """
    found: dict[tuple[Level, str, str], list[Node]] = {}
    for node in nodes:
        if told := look(node):
            found.setdefault(told, []).append(node)
    return worst(
        name, [Check(name, level, f"{names(at)}: {what}", mend) for (level, what, mend), at in found.items()], ok
    )


def answered(nodes: list[Node]) -> list[Node]:
    """Those that said something."""
    return [node for node in nodes if not node.get("error")]


def storage(nodes: list[Node], path: str, error: str, remote: bool = False) -> Check:
    """What the driver writes is read on every node, and the reverse.

    Args:
        nodes: those that were asked have `storage`, with `back`: the driver read what the node wrote.
        path: of the job.
        error: what the driver met.
        remote: it is an address.
    """
    if remote:
        where = "the network and AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL"
        mend, unusable = f"check {where} of that node", f"check the address, {where} of this machine"
    else:
        mend = "set storage=FOLDER to one that every node mounts at this path (NFS, EFS, a PersistentVolumeClaim), "
        mend += "writable; or to s3://BUCKET/FOLDER"
        unusable = "set storage=FOLDER to one that can be written"
    if error:
        return Check("storage", "FAIL", f"can't make run folders in {path}: {error}", unusable)

    def look(node: Node) -> tuple[Level, str, str] | None:
        found = node["storage"]
        if found["error"]:
            return "FAIL", f"{path} can't be written there: {found['error']}", mend
        if not found["there"]:
            return "FAIL", f"{path} is not shared: there is no such folder there", mend
        if not found["seen"]:
            return "FAIL", f"{path} is not shared: what this machine writes is not seen there", mend
        if not found.get("back"):
            return "FAIL", f"{path} is not shared: what is written there is not seen here", mend
        if found["free_bytes"] is not None and found["free_bytes"] < DISK_BYTES:
            return (
                "WARN",
                f"{gb(found['free_bytes'])} free in {path}",
                "free space: checkpoints and models are kept there",
            )
        return None

    asked = [node for node in nodes if node.get("storage")]
    if not asked:
        return Check("storage", "FAIL", f"{path}: no node answered", ANSWER)
    free = min(
        (node["storage"]["free_bytes"] for node in asked if node["storage"]["free_bytes"] is not None), default=None
    )
    reached = f"written and read on {'all ' + str(len(asked)) + ' nodes' if len(asked) > 1 else names(asked)}"
    return each("storage", asked, f"{path}: {reached}" + (f", {gb(free)} free" if free is not None else ""), look)


def dataset(nodes: list[Node], error: str | None) -> Check:
    """Every node reads the dataset; `error`: what this machine met when it looked for it."""
    asked = [node for node in nodes if node.get("data")]
    mend = "set data.path to a folder that every node mounts, or to an address (s3://…)"
    if error:
        return Check("dataset", "FAIL", f"here: {error}", mend)

    def look(node: Node) -> tuple[Level, str, str] | None:
        return ("FAIL", node["data"]["error"], mend) if node["data"]["error"] else None

    if not asked:
        return Check("dataset", "FAIL", "no node answered", ANSWER)
    text = asked[0]["data"]["text"]
    return each("dataset", asked, text + (f", read on all {len(asked)} nodes" if len(asked) > 1 else ""), look)


def tokens(open_: bool | None, where: str, modes: set[str | None]) -> Check:
    """Who has no token is kept out.

    Args:
        open_: whether the GCS answered a question without one; None: it was not to be asked.
        where: its address.
        modes: RAY_AUTH_MODE on the nodes.
    """
    if open_:
        return Check(
            "tokens", "FAIL", f"Ray at {where} asks for no token: who reaches it runs code as its user", USE_TOKENS
        )
    if open_ is False:
        return Check("tokens", "OK", f"Ray at {where} refuses who shows no token")
    if modes and modes <= {"token", "k8s"}:
        return Check("tokens", "OK", "RAY_AUTH_MODE is token")
    return Check(
        "tokens",
        "WARN",
        f"Ray at {where} gave no answer; RAY_AUTH_MODE is {', '.join(sorted(str(m) for m in modes))}",
        USE_TOKENS,
    )


def own_tokens(mode: str | None) -> Check:
    """A Ray of this machine alone, that is yet to be started: it asks for tokens unless told otherwise."""
    if mode in (None, "token"):
        return Check("tokens", "OK", "Ray, started for a job on this machine, asks for tokens")
    return Check(
        "tokens", "WARN", f"RAY_AUTH_MODE={mode}: Ray listens on all interfaces without asking for a token",
        "unset RAY_AUTH_MODE, or set it to token",
    )  # fmt: skip


def dashboard(url: str | None, listens: list[str] | None, open_: bool | None) -> Check:
    """The dashboard runs code for those who reach it: they should be on its machine.

    Args:
        url: host:port as Ray has noted it; None: there is none.
        listens: addresses on which its port is open; None: unknown.
        open_: whether it answered without a token; None: unknown.
    """
    if url is None:
        return Check("dashboard", "OK", "none")
    host, _, port = url.rpartition(":")
    told = listens or [host.strip("[]")]
    beyond = [a for a in told if not (a.startswith("127.") or a in ("::1", "localhost"))]
    mend = "start the head with --dashboard-host 127.0.0.1, and reach it through ssh -L 8265:127.0.0.1:8265"
    if not beyond:
        return Check("dashboard", "OK", f"listens on {', '.join(told)}:{port} only")
    every = {"0.0.0.0": "all interfaces (0.0.0.0)", "::": "all interfaces (::)"}
    where = f"listens on {', '.join(every.get(a, a) for a in beyond)}, port {port}"
    if open_ is not False:
        why = "without asking for a token" if open_ else "and did not say whether it asks for a token"
        return Check(
            "dashboard", "FAIL", f"{where}, {why}: who reaches it runs code", f"{mend}; set RAY_AUTH_MODE=token"
        )
    return Check("dashboard", "WARN", f"{where}; it asks for tokens, which travel unencrypted", mend)


def lines(checks: list[Check], where: str) -> list[str]:
    """What a terminal shows: a line a check, the mend below it, a summary of what was looked at."""
    width = max(len(check.name) for check in checks)
    text = []
    for check in checks:
        text.append(f"{check.level:<5} {check.name:<{width}}  {check.found}")
        if check.level != "OK":
            text.append(f"{'':<5} {'':<{width}}  → {check.mend}")
    count = {level: sum(check.level == level for check in checks) for level in ("OK", "WARN", "FAIL")}
    return [mask(line) for line in [*text, f"{where}: " + ", ".join(f"{n} {level}" for level, n in count.items() if n)]]
