"""YAML in which a key given twice is an error; YAML's own rule, that the last one wins, hides a mistake."""

from typing import Any

import yaml

from raydmd.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """Loads plain values; raises UserError for a key that is given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            UserError: a key is given twice.
        """
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                continue  # SafeLoader itself refuses these
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)
