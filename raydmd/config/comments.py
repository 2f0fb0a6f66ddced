"""The comments beside a recipe's keys, which say where its values come from."""

import re
from collections.abc import Sequence

import yaml

COMMENT = re.compile(r"(?:^|\s)#\s*(.*)$")


def comment_beside(text: str, key: Sequence[str]) -> str | None:
    """Return the comment on the line of a key, or of the section that it is written in on one line.

    Args:
        text: of the YAML file.
        key: its path.

    Returns:
        None: the file has no such key, or no comment there.
    """
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None  # None of an empty text
    for name in key:
        if not isinstance(node, yaml.MappingNode):
            return None
        found = next((pair for pair in node.value if pair[0].value == name), None)
        if found is None:
            return None
        key_node, node = found
        whole = isinstance(node, yaml.MappingNode) and not node.flow_style  # its lines are its keys' own
        line = key_node.end_mark if whole else node.end_mark
    if line is None:
        return None
    rest = text.splitlines()[line.line][line.column :]
    comment = COMMENT.search(rest)
    return comment[1].strip() if comment is not None and comment[1].strip() else None
