"""The device mesh, and the mesh axes that a rule gives to the dims of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rl.config.load import dump_config, load_config
from rl.devices.mesh import (
    AXES,
    check_rules_are_used,
    create_mesh,
    embedding_exchange,
    input_sharding,
    num_row_shards,
    partition_spec,
    replicated,
    row_axes,
    row_sharding,
    tree_shardings,
)
from rl.tools.programs.hlo import work_of


def mesh_of(*overrides, devices=None):
    return create_mesh(load_config(None, overrides).mesh, devices)


def rules_of(*overrides):
    return load_config(None, overrides).mesh.rules


# Sizes


def test_a_process_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh.num_devices must leave each of 2 processes a device, got 4, none of"):
        mesh_of("mesh.num_devices=4")


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ((), (1, 8, 1)),
        (("mesh.data=2", "mesh.tensor=2"), (2, 2, 2)),
        (("mesh.data=-1", "mesh.fsdp=1"), (8, 1, 1)),
        (("mesh.data=4", "mesh.fsdp=2"), (4, 2, 1)),
        (("mesh.data=8", "mesh.fsdp=-1"), (8, 1, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(overrides, shape):
    mesh = mesh_of(*overrides)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())


def test_a_mesh_over_some_devices_uses_only_those():
    mesh = mesh_of(devices=jax.devices()[2:5])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 3, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[2:5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("mesh.fsdp=3",),
            r"multiply to the 8 device\(s\) in use, got data=1 x fsdp=3 x tensor=1; .* one of \[1, 2, 4, 8\]",
        ),
        (("mesh.data=3",), r"got data=3 x fsdp=-1 x tensor=1; each size must be one of \[1, 2, 4, 8\]"),
        (("mesh.fsdp=4",), r"multiply to the 8 device\(s\) in use, got data=1 x fsdp=4"),
        (("mesh.data=-1",), r"at most one mesh axis may be -1, got -1 for \['data', 'fsdp'\]; set all but one"),
        (("mesh.tensor=0",), r"mesh\.tensor must be a number of devices >= 1, or -1 for what is left, got 0"),
        (("mesh.rules.mlp=[tensors]",), r"mesh\.rules\.mlp must name mesh axes out of \['data', .*, got 'tensors'"),
        (("mesh.rules.mlp=[tensor, tensor]",), r"mesh\.rules\.mlp must name each mesh axis once"),
        (("mesh.rules.mlp=[[tensors], []]",), r"mesh\.rules\.mlp must name mesh axes out of \['data', .*got 'tensors'"),
        (("mesh.rules.mlp=[[tensor, tensor]]",), r"mesh\.rules\.mlp must name each mesh axis once, got \['tensor', "),
        (
            ("mesh.rules.mlp=[[tensor], [fsdp], [tensor, fsdp]]",),
            r"mlp must have its longer alternatives first, got \['tensor', 'fsdp'\] behind \['tensor'\].*; swap them",
        ),
        (("mesh.rollout_rules={mlp: [[], [fsdp]]}",), r"rollout_rules\.mlp must .* got \['fsdp'\] behind \[\]"),
        (("mesh.rules.mlp=[tensor, [fsdp]]",), r"mlp must be a list of mesh axes, .*, got \['tensor', \['fsdp'\]\]"),
        (("mesh.rules.mlp=[[[fsdp]]]",), r"mlp must be a list of mesh axes, .*\[\[fsdp, tensor\], \[fsdp\]\], .*, got"),
        (("mesh.rollout_rules={mlp: [1]}",), r"mesh\.rollout_rules\.mlp must be a list of mesh axes, .*, got \[1\]"),
    ],
)
def test_sizes_and_rules_that_do_not_fit_say_what_would(overrides, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(*overrides)


# Rules


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (16, 32), P("fsdp", "tensor")),
        (("vocab", "embed"), (259, 16), P(None, "fsdp")),  # 259 is odd
        (("embed", "kv_heads", "head_dim"), (16, 1, 8), P("fsdp", None, None)),  # one head cannot be cut
        ((None, "norm"), (4, 16), P(None, None)),
        (("batch", "embed"), (8, 16), P(("data", "fsdp"), None)),  # an axis serves one dim of an array
        (("batch",), (2,), P("data")),
        (("batch",), (6,), P("data")),  # 6 = 2 x 3: the second axis is dropped
        ((), (), P()),
    ],
)
def test_a_rule_gives_the_axes_that_divide_the_dim_and_are_free(axes, shape, spec):
    mesh = mesh_of("mesh.data=2", "mesh.tensor=2")
    assert partition_spec(axes, shape, mesh, rules_of()) == spec


def test_axes_of_size_one_are_left_out():
    assert partition_spec(("vocab", "embed"), (16, 16), mesh_of(), rules_of()) == P(None, "fsdp")


def test_rules_come_from_the_configuration():
    rules = rules_of("mesh.rules.embed=[]", "mesh.rules.mlp=[fsdp, tensor]")
    mesh = mesh_of("mesh.data=2", "mesh.tensor=2")
    assert partition_spec(("embed", "mlp"), (16, 32), mesh, rules) == P(None, ("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("rule", "axes", "shape", "spec"),
    [
        # data=2, fsdp=2, tensor=2
        ("[[fsdp, tensor], [fsdp]]", ("embed",), (16,), P(("fsdp", "tensor"))),
        ("[[fsdp, tensor], [fsdp]]", ("embed",), (6,), P("fsdp")),  # four devices do not divide it, two do
        ("[[fsdp, tensor], [fsdp]]", ("mlp", "embed"), (16, 16), P("tensor", "fsdp")),  # the other dim has one of them
        ("[[fsdp, tensor], [fsdp]]", ("embed", "mlp"), (16, 16), P(("fsdp", "tensor"), None)),  # dims in their order
        ("[[fsdp, tensor], [data]]", ("embed",), (6,), P("data")),  # all of a list or none of it
        ("[fsdp, tensor]", ("embed",), (6,), P("fsdp")),  # of a flat list those that fit
        ("[[fsdp, tensor], [fsdp], []]", ("embed",), (7,), P(None)),
        ("[[fsdp, tensor]]", ("embed",), (7,), P(None)),
        ("[[expert, tensor], [fsdp]]", ("embed",), (6,), P("tensor")),  # of size one: it cuts nothing
    ],
)
def test_of_alternatives_the_first_whose_axes_all_divide_and_are_free_wins(rule, axes, shape, spec):
    overrides = ("mesh.data=2", "mesh.tensor=2", "mesh.axes={expert: 1}", f"mesh.rules.embed={rule}")
    assert partition_spec(axes, shape, mesh_of(*overrides), rules_of(*overrides)) == spec


def test_rows_go_by_the_first_alternative():
    overrides = ("mesh.data=2", "mesh.tensor=2", "mesh.rules.batch=[[data, tensor], [data]]")
    mesh, rules = mesh_of(*overrides), rules_of(*overrides)
    assert (row_axes(mesh, rules), num_row_shards(mesh, rules)) == (("data", "tensor"), 4)
    assert row_sharding(mesh, rules, dim=1).spec == P(None, ("data", "tensor"))
    assert row_axes(mesh, rules_of("mesh.rules.batch=[[data], []]")) == ("data",)
    assert embedding_exchange(mesh, rules | {"embed": [["tensor", "fsdp"], ["fsdp"]]}, 16) is not None


def test_alternatives_survive_the_configuration_that_a_run_writes(tmp_path):
    config = load_config(
        None, ["mesh.rules.embed=[[fsdp, tensor], [fsdp]]", "mesh.rollout_rules={mlp: [[tensor], []]}"]
    )
    (tmp_path / "config.yml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yml") == config


def test_names_that_do_not_match_the_array_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 4\) needs 2 logical axes, got \('embed',\)"):
        partition_spec(("embed",), (4, 4), mesh_of(), rules_of())
    with pytest.raises(ValueError, match=r"mesh\.rules must have an entry for the logical axis 'experts', got only \["):
        partition_spec(("experts",), (4,), mesh_of(), rules_of())


# Shardings


def test_every_leaf_of_a_tree_gets_its_sharding():
    mesh = mesh_of("mesh.tensor=2")
    abstract = {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32), "scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    shardings = tree_shardings(abstract, {"kernel": ("embed", "mlp"), "scale": ("norm",)}, mesh, rules_of())
    assert shardings == {
        "kernel": NamedSharding(mesh, P("fsdp", "tensor")),
        "scale": NamedSharding(mesh, P(None)),
    }
    placed = jax.device_put(np.zeros((8, 6), np.float32), shardings["kernel"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(
    ("overrides", "axes", "count"),
    [
        (("mesh.data=2", "mesh.tensor=2"), ("data", "fsdp"), 4),
        ((), ("fsdp",), 8),
        (("mesh.fsdp=1", "mesh.tensor=8"), (), 1),
    ],
)
def test_rows_are_cut_over_the_axes_of_the_batch_rule(overrides, axes, count):
    mesh, rules = mesh_of(*overrides), rules_of(*overrides)
    assert row_axes(mesh, rules) == axes
    assert num_row_shards(mesh, rules) == count
    rows = jax.device_put(np.zeros((3, 8, 5)), row_sharding(mesh, rules, dim=1))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3, 8 // count, 5)}
    assert replicated(mesh).is_fully_replicated
    by_name = input_sharding((None, "batch", None), mesh, rules)
    assert by_name.is_equivalent_to(rows.sharding, rows.ndim)


def test_inputs_with_an_axis_that_no_rule_has_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.rules must have an entry for the logical axis 'length'"):
        input_sharding(("length",), mesh_of(), rules_of())


def test_matrix_products_of_sharded_arrays_need_no_output_sharding():
    mesh = mesh_of("mesh.tensor=2")
    left = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(4, 8), NamedSharding(mesh, P("fsdp", "tensor")))
    right = jax.device_put(np.ones((8, 2), np.float32), NamedSharding(mesh, P("fsdp", None)))
    np.testing.assert_array_equal(left @ right, np.asarray(left) @ np.asarray(right))


# More axes, and slices


@pytest.mark.parametrize("overrides", [(), ("mesh.data=2",)])
def test_rows_of_a_table_and_their_gradient_go_between_devices_without_any_device_holding_all(overrides):
    mesh, rules = mesh_of(*overrides), rules_of(*overrides)
    exchange = embedding_exchange(mesh, rules, 16)
    rng = np.random.default_rng(0)
    table_VD, tokens_BT = rng.normal(size=(24, 16)).astype(np.float32), rng.integers(0, 24, (8, 5))

    def loss(table_VD, tokens_BT, change=lambda x_BTD: x_BTD):
        return jnp.sum(jnp.sin(change(jnp.take(table_VD, tokens_BT, axis=0))))

    shardings = (
        NamedSharding(mesh, partition_spec(("vocab", "embed"), (24, 16), mesh, rules)),
        row_sharding(mesh, rules),
    )
    spread = jax.jit(
        jax.value_and_grad(lambda *arguments: loss(*arguments, exchange)),
        in_shardings=shardings,
        out_shardings=(replicated(mesh), shardings[0]),
    )
    sent = work_of(spread.lower(table_VD, tokens_BT).compile().as_text(), {}).collectives
    assert sent["all-to-all"].num_bytes == 2 * 4 * 8 * 5 * 16 // mesh.size  # a device's own rows, there and back
    others = sum(collective.num_bytes for kind, collective in sent.items() if kind != "all-to-all")
    # Token ids, and where rows lie over an axis without columns the gradient's sum.
    assert others < table_VD.nbytes // 2
    got, expected = spread(table_VD, tokens_BT), jax.value_and_grad(loss)(table_VD, tokens_BT)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)


def test_rows_stay_where_they_are_without_an_axis_in_common_or_where_they_do_not_divide():
    assert embedding_exchange(mesh_of("mesh.data=8", "mesh.fsdp=1"), rules_of(), 16) is None
    exchange, x_BTD = embedding_exchange(mesh_of(), rules_of(), 16), jnp.ones((3, 5, 16))
    assert exchange is not None
    assert exchange(x_BTD) is x_BTD


def test_the_configuration_adds_axes_between_fsdp_and_tensor():
    overrides = (
        "mesh.fsdp=2",
        "mesh.axes={context: 2, expert: 1}",
        "mesh.tensor=2",
        "mesh.rules.mlp=[tensor, context]",
    )
    mesh, rules = mesh_of(*overrides), rules_of(*overrides)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 2, "expert": 1, "tensor": 2}
    assert partition_spec(("embed", "mlp"), (16, 32), mesh, rules) == P("fsdp", ("tensor", "context"))
    assert mesh_of("mesh.fsdp=1", "mesh.axes={context: -1}").shape["context"] == 8


@pytest.mark.parametrize("name", ["fsdp", "no name"])
def test_an_added_axis_has_a_name_of_its_own(name):
    with pytest.raises(ValueError, match=rf"mesh\.axes must name axes beside \['data', .*, got '{name}'"):
        mesh_of(f"mesh.axes={{{name}: 2}}")


def test_rules_may_name_axes_of_a_model_of_ones_own():
    overrides = ("mesh.rules.experts=[tensor]", "mesh.tensor=2")
    assert partition_spec(("experts",), (4,), mesh_of(*overrides), rules_of(*overrides)) == P("tensor")
    check_rules_are_used({"w": ("experts", None), "b": ()}, rules_of(*overrides))
    with pytest.raises(ValueError, match=r"mesh\.rules\.experts must name a logical axis of the model, .*\['embed'\]"):
        check_rules_are_used({"w": ("embed", None)}, rules_of(*overrides))


def test_slices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.dcn must multiply to the number of slices, 1, got \{'data': 2\}"):
        mesh_of("mesh.data=2", "mesh.dcn={data: 2}")
    with pytest.raises(ValueError, match=r"mesh\.dcn must name mesh axes out of \['data', .*, got 'date'"):
        mesh_of("mesh.dcn={date: 1}")
    with pytest.raises(ValueError, match=r"mesh\.dcn\.data must divide the size of that axis, 2, got 3"):
        mesh_of("mesh.data=2", "mesh.dcn={data: 3}")


# On TPU chips that are not there


@pytest.fixture(scope="module")
def two_slices():
    """The chips of two slices of 16, as libtpu describes them without a TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices


def slices_of(mesh, **index):
    """The slices of the devices at these places of the mesh, all others taken whole."""
    grid = mesh.devices[tuple(index.get(axis, slice(None)) for axis in mesh.axis_names)]
    return {device.slice_index for device in np.asarray(grid).flat}


def test_the_first_axis_goes_over_the_slices(two_slices):
    mesh = mesh_of("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=4", devices=two_slices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 4}
    assert slices_of(mesh, data=0) != slices_of(mesh, data=1)
    assert all(len(slices_of(mesh, data=i)) == 1 for i in range(2))
    assert len(set(mesh.devices.flat)) == 32


def test_the_next_axis_goes_over_them_where_the_first_is_too_short(two_slices):
    mesh = mesh_of("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=4", devices=two_slices)
    assert [len(slices_of(mesh, fsdp=slice(start, start + 4))) for start in (0, 4)] == [1, 1]


def test_the_configuration_says_which_axis_goes_over_slices(two_slices):
    mesh = mesh_of("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=4", "mesh.dcn={fsdp: 2}", devices=two_slices)
    assert slices_of(mesh, data=0) == {0, 1}
    assert [len(slices_of(mesh, fsdp=i)) for i in range(4)] == [1, 1, 1, 1]


def test_neighbours_on_the_tensor_axis_are_neighbours_on_the_chips_network(two_slices):
    mesh = mesh_of("mesh.fsdp=4", "mesh.tensor=4", devices=[d for d in two_slices if d.slice_index == 0])
    for row in mesh.devices.reshape(4, 4):
        lines = [{device.coords[dim] for device in row} for dim in range(2)]
        assert sorted(map(len, lines)) == [1, 4]  # a whole line of the torus


def test_a_part_of_the_chips_need_not_be_a_block(two_slices):
    one = [d for d in two_slices if d.slice_index == 0]
    mesh = mesh_of("mesh.num_devices=5", devices=one)
    assert list(mesh.devices.flat) == one[:5]
    with pytest.raises(ValueError, match=r"each slice must have equally many devices of the mesh, got \[4, 16\]"):
        mesh_of("mesh.num_devices=20", devices=two_slices)
