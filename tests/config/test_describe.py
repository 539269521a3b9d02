"""Every field is documented, and the schema says what the dataclasses say."""

import json
from dataclasses import fields, is_dataclass

import jsonschema_rs

from kajiya.config.compose import compose, list_recipes
from kajiya.config.describe import field_docs, json_schema, tables_schema, whole_schema
from kajiya.config.digest import to_plain
from kajiya.config.schema import Config
from kajiya.config.tables import TABLES, import_target


def _undocumented(section: type) -> list[str]:
    docs = field_docs(section)
    missing = [f"{section.__name__}.{item.name}" for item in fields(section) if not docs.get(item.name)]
    for item in fields(section):
        if is_dataclass(item.type) and isinstance(item.type, type):
            missing += _undocumented(item.type)
    return missing


def test_every_field_is_documented() -> None:
    assert _undocumented(Config) == []
    rows = [row.options for table in TABLES.values() for row in table.values()]
    assert len(rows) >= 15
    for options in rows:
        assert _undocumented(options) == []


def test_the_schema_holds_types_bounds_and_choices() -> None:
    schema = json_schema()
    lr = schema["properties"]["optim"]["properties"]["lr"]
    assert lr["type"] == "number"
    assert lr["exclusiveMinimum"] == 0
    assert schema["properties"]["train"]["properties"]["precision"]["enum"][0] == "auto"
    assert schema["properties"]["model"]["properties"]["n_params"]["type"] == ["string", "null"]
    assert "momentum" in tables_schema()["optimizer"]["muon"]["properties"]


def test_it_is_a_json_schema_that_every_packaged_recipe_meets() -> None:
    schema = json.loads(json.dumps(whole_schema()))
    jsonschema_rs.meta.validate(schema)
    meets = jsonschema_rs.validator_for(schema)
    for rows in schema["$defs"].values():
        for options in rows.values():
            jsonschema_rs.meta.validate(options | {"$schema": schema["$schema"]})
    assert len(list_recipes()) >= 14
    for name in list_recipes():
        problems = [f"{error.instance_path}: {error.message}" for error in meets.iter_errors(to_plain(compose(name)))]
        assert problems == [], name
    plain = to_plain(compose("stdlib-pretrain"))
    for section, wrong in (("optim", {"lr": 0}), ("train", {"precision": "bf17"}), ("data", {"no_such": 1})):
        assert not meets.is_valid(plain | {section: plain[section] | wrong}), wrong


def test_every_row_of_every_table_can_be_loaded() -> None:
    targets = [row.target for table in TABLES.values() for row in table.values()]
    assert len(targets) >= 15
    for target in targets:
        assert callable(import_target(target, "test"))
