"""Process groups of ranks on the CPU, with real gloo processes."""

import multiprocessing

import pytest

WORLD = 3


def rank(number, folder, results):
    import torch
    import torch.distributed as dist

    from anchortp_sglang.platforms.cpu.groups import Groups

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=number, world_size=WORLD)
    made, stock = [], dist.new_group

    def count(ranks, **more):
        made.append(list(ranks))
        return stock(ranks, **more)

    groups = Groups(count)
    everyone = [groups(list(range(WORLD)), backend="gloo", group_desc=name) for name in ("tp:device", "tp:cpu")]
    alone = [groups([other], backend="gloo") for _ in range(2) for other in range(WORLD)]
    pair = groups([0, 2], backend="gloo")
    total, own = torch.tensor([number + 1.0]), torch.tensor([number + 1.0])
    dist.all_reduce(total, group=everyone[1])
    mine = [group for group in alone if group is not dist.GroupMember.NON_GROUP_MEMBER]
    dist.all_reduce(own, group=mine[0])
    results.put((number, total.item(), own.item(), everyone[0] is everyone[1], mine[0] is mine[1], len(mine), made))
    if number != 1:
        dist.barrier(group=pair)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    results, folder = context.Queue(), tmp_path_factory.mktemp("gloo")
    processes = [context.Process(target=rank, args=(number, str(folder), results)) for number in range(WORLD)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    return found


def test_all_ranks_share_one_group_and_each_has_one_of_its_own(ranks):
    for number, (who, total, own, one_for_all, one_alone, count, _) in enumerate(ranks):
        assert (who, total, own) == (number, 6.0, number + 1.0)
        assert one_for_all and one_alone and count == 2


def test_only_groups_that_are_neither_are_made_by_all(ranks):
    assert [made for *_, made in ranks] == [[[number], [0, 2]] for number in range(WORLD)]
