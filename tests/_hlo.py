"""What a compiled program sends between devices, read from its HLO text."""

import collections
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def _sizes(shape):
    """Entries and bytes of an HLO shape, an array or a tuple of them."""
    entries = nbytes = 0
    for dtype, dims in _ARRAY.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        entries += count
        nbytes += count * bits // 8
    return entries, nbytes


def collectives(text):
    """The collectives of an HLO text: kind, result shape, entries, bytes, op name."""
    found = []
    for line in text.splitlines():
        match = _OPERATION.search(line)
        if match:
            shape, kind = match.groups()
            entries, nbytes = _sizes(shape)
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(
                {
                    "kind": kind,
                    "shape": re.sub(r"\{[\d,]*\}", "", shape),
                    "entries": entries,
                    "bytes": nbytes,
                    "op": name.group(1) if name else "",
                }
            )
    return found


def kinds(text):
    """How many collectives of each kind the program has."""
    return dict(collections.Counter(c["kind"] for c in collectives(text)))


def custom_calls(text):
    """The targets of all custom calls: library routines, and calls to the host."""
    return sorted(set(re.findall(r'custom_call_target="([^"]*)"', text)))


def _computations(text):
    """The body of each computation of an HLO module, by name."""
    bodies, name = {}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name = header.group(1)
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    return {name: "\n".join(lines) for name, lines in bodies.items()}


def _callees(body):
    names = set(_CALLED.findall(body))
    for branches in _BRANCHES.findall(body):
        names |= {b.strip().lstrip("%") for b in branches.split(",")}
    return names


def loops(text):
    """For each loop, what one of its iterations sends: how many operations and bytes.

    An operation in either branch of a conditional counts as sent.
    """
    bodies = _computations(text)

    def reached(names):
        seen, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name in bodies and name not in seen:
                seen.add(name)
                todo += _callees(bodies[name])
        return seen

    per_loop = []
    pattern = r" while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)(.*)"
    for match in re.finditer(pattern, text):
        inside = reached(match.groups()[:2])
        sent = [c for name in sorted(inside) for c in collectives(bodies[name])]
        name = re.search(r'op_name="([^"]*)"', match.group(3))
        per_loop.append(
            {
                "op": name.group(1) if name else "",
                "kinds": dict(collections.Counter(c["kind"] for c in sent)),
                "bytes": sum(c["bytes"] for c in sent),
            }
        )
    return per_loop
