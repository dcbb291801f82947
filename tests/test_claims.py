"""Rules that judge claims, on made-up tables: where nothing differs none says "reproduced", where a
claim holds it does, and where it is reversed it does not"""
import numpy as np
import pandas as pd
import pytest

from ffp_nb.studies import (
    ablation, allocation, criteria, dynamic, prediction, recovery, schedules, searchers, slopes,
    spine)
from ffp_nb.studies.cells import MODES, policy_table
from ffp_nb.studies.registry import STUDIES
from ffp_nb.studies.study import LEVEL, MARGIN, clusters, holm, no_worse, p_value, told

DRAWS = range(10)
MODELS, SEEDS = ('a', 'b', 'c'), (0, 1, 2)


def runs_of(g, searchers, noise, models=MODELS, sparsity=0.5, **effect):
    """A row for each search: nats of a model, a seed, and noise of its own; `effect`: nats above by
    policy"""
    rows = []
    for m in models:
        base = 3 + g.normal()
        for s in SEEDS:
            shared = g.normal(0, 0.1)
            rows += [dict(model=m, sparsity=sparsity, seed=s, policy=p, variant=v, search_s=1.0,
                          nll=base + shared + effect.get(p, 0) + g.normal(0, noise))
                     for p, v in searchers]
    return pd.DataFrame(rows).assign(ppl=lambda t: np.exp(t.nll))


def traces_of(g, searchers, models=MODELS, faster=None, sparsity=0.5):
    """Traces that end alike; `faster`: for one (policy, variant) and model, how many times. Without
    it each trace is a walk of its own"""
    rows, tokens = [], np.arange(1, 21) * 10_000
    for m in models:
        for s in SEEDS:
            for p, v in searchers:
                if faster is None:
                    nll = 3 - np.cumsum(g.exponential(0.01, len(tokens)))
                else:
                    k = faster.get(m, 1.0) if (p, v) == searchers[0] else 1.0
                    nll = 4 - np.minimum(1, k * tokens / tokens[-1])
                rows += [dict(model=m, sparsity=sparsity, seed=s, policy=p, variant=v, nll=x,
                              gap=x - 2, forward_tokens=t) for t, x in zip(tokens, nll)]
    return pd.DataFrame(rows)


RIVALS = [('ffp', 'default'), ('eas', 'none'), ('cma', 'default'), ('tpe', 'default'),
          ('random-search', 'none'), ('ddpg', 'default')]
PAIR = [('ffp', 'default'), ('ffp', 'none')]


def cheaper(g, faster=None):
    return pd.DataFrame(), traces_of(g, RIVALS[:2], faster=faster)


def rivals(g, noise=0.05, **effect):
    return runs_of(g, RIVALS, noise, **effect), pd.DataFrame()


def schedule(g, faster=None, models=MODELS):
    return pd.DataFrame(), traces_of(g, PAIR, models, faster)


def transfer(g, noise=0.03, nearer=0.0, worse=0.0, models=MODELS):
    "A new agent and a transferred one: test nats, and nats above dense at the first point"
    variants = [('ffp', 'default'), ('ffp', 'transfer')]
    mine = runs_of(g, variants, noise, models, 0.3)
    moved = mine.variant == 'transfer'
    mine = mine.assign(nll=mine.nll + worse * moved,
                       record=[dict(result=dict(before=1))] * len(mine))
    first = mine.assign(gap=0.1 - nearer * moved + g.normal(0, noise, len(mine)))
    return mine, first


def repair(g, gain=0.0, blocks=64):
    "Searched policies of three seeds at three targets, with `gain` nats by repair"
    records = []
    for sparsity in spine.SPARSITIES:
        for s in SEEDS:
            text = 4 + g.normal(0, 0.5, blocks)
            nll = {m: text - gain * (m == 'sequential') + g.normal(0, 0.1, blocks) for m in MODES}
            records.append(dict(config=dict(sparsity=sparsity, seed=s, method='ffp'),
                                result=dict(nll=nll, sparsity=sparsity), forward_tokens=1))
    return policy_table(records, lambda r: 'm'), dict(enumerate(records))


HEURISTICS = ('sensitivity', 'flap', 'owl', 'alphapruning', 'gate', 'uniform')


def heuristics(g, gain=0.0, models=('a', 'b', 'c', 'd'), noise=0.01):
    "`gain`: nats of ffp below all others, by model or for all"
    gains, rows = gain if isinstance(gain, dict) else dict.fromkeys(models, gain), []
    for m in models:
        for s in spine.SPARSITIES:
            for p, seeds in (('ffp', SEEDS), *((h, (0,)) for h in HEURISTICS)):
                rows += [dict(model=m, sparsity=s, policy=p, seed=k, calibration=c,
                              nll=3 - gains.get(m, 0) * (p == 'ffp') + g.normal(0, noise))
                         for k in seeds for c in MODES]
    return pd.DataFrame(rows).assign(
        ppl=lambda t: np.exp(t.nll),
        blocks=lambda t: [v + np.linspace(-0.1, 0.1, 8) for v in t.nll]),


def error(g, skill=0.0, spread=1.0):
    """Five predictors on a hundred unseen policies of each seed; with no skill a prediction has
    nothing to do with the truth. The one of each seed is chosen by other policies"""
    rows = []
    for seed in SEEDS:
        rank = g.permutation(5)
        for i, name in enumerate(('cnn', 'spline', 'ridge', 'boosting', 'gp')):
            y = g.normal(3, spread, 100)
            guess = skill * (y - 3) + (1 - skill) * g.normal(0, 0.3, 100) + 3
            mse = float(np.mean((guess - y)**2))
            rows += [dict(predictor=name, split=s, seed=seed, train=n, mse=mse, spearman=skill,
                          minmax=mse / np.ptp(y)**2, median=0.1, relative=1.0, coverage=0.9,
                          surprise=1.0, us=5.0, us_alone=1000.0, fit_s=1.0, chosen=rank[i] == 0)
                     for s in prediction.SPLITS for n in (50, 400)]
    return pd.DataFrame(rows), dict(model_s=0.001, blocks=16), pd.DataFrame()


def for_all_targets(g, gain=0.0, noise=0.02):
    "One agent and five heuristics at two targets; even cuts that are far worse"
    rows = [dict(agent=a, seed=s, sparsity=x, tokens=1, nll=3 + d + g.normal(0, noise))
            for a, d, seeds in (('range', -gain, SEEDS), ('fixed', -gain, SEEDS),
                                ('uniform', 1, (0,)), ('uniform-ffn', 1, (0,)))
            for s in seeds for x in (0.1, 0.3, 0.5)]
    others = [dict(policy=h, sparsity=x, nll=3 + g.normal(0, noise)) for h in HEURISTICS[:5]
              for x in (0.2, 0.3, 0.5)]
    return pd.DataFrame(rows), pd.DataFrame(others)


# claim by its place: tables in which nothing differs
NOTHING = {1: heuristics, 2: cheaper, 3: rivals, 4: schedule, 5: transfer, 6: repair, 8: error,
           9: error, 10: for_all_targets}
CLAIMS = {c.place: c for s in STUDIES.values() for c in s.claims}


def judge(place, *tables):
    word, measured = CLAIMS[place].rule(*tables)
    assert measured and 'nan' not in measured
    return word


def test_every_claim_has_such_a_test():
    untestable = {p for p, c in CLAIMS.items() if c.rule.__name__ in ('_small', 'large_models')}
    assert set(NOTHING) == set(CLAIMS) - untestable


@pytest.mark.parametrize('place', NOTHING)
def test_where_nothing_differs_nothing_is_reproduced(place):
    words = [judge(place, *NOTHING[place](np.random.default_rng([place, i]))) for i in DRAWS]
    assert 'reproduced' not in words
    # nor in part, but for what chance does at 95 %
    assert words.count('not reproduced') >= len(words) - 2


HOLDS = {1: (heuristics, dict(gain=0.1)), 2: (cheaper, dict(faster=dict(a=4.0, b=4.2, c=3.9))),
         3: (rivals, dict(noise=0.0005)), 4: (schedule, dict(faster=dict(a=2.0, b=2.2, c=1.9))),
         5: (transfer, dict(noise=0.0005, nearer=0.02)), 6: (repair, dict(gain=0.3)),
         8: (error, dict(skill=0.99)), 10: (for_all_targets, dict(gain=0.6))}
REVERSED = {1: (heuristics, dict(gain=-0.1)), 2: (cheaper, dict(faster=dict(a=0.5, b=0.4, c=0.6))),
            3: (rivals, dict(noise=0.0005, ffp=0.05)),
            4: (schedule, dict(faster=dict(a=0.5, b=0.4, c=0.6))),
            5: (transfer, dict(noise=0.0005, nearer=-0.02, worse=0.05)),
            6: (repair, dict(gain=-0.3)),
            8: (error, dict(skill=-1.0)), 10: (for_all_targets, dict(gain=-0.6))}
PARTLY = {1: (heuristics, dict(gain=dict(a=0.3, b=-0.1), noise=0.003)),
          2: (cheaper, dict(faster=dict(a=2.0, b=2.2, c=1.9))),
          3: (rivals, dict(noise=0.0005, cma=-0.05)),
          5: (transfer, dict(noise=0.0005, worse=0.05, nearer=0.02)),
          8: (error, dict(skill=0.9)), 10: (for_all_targets, dict(gain=0.2))}


@pytest.mark.parametrize('cases, word', [(HOLDS, 'reproduced'), (REVERSED, 'not reproduced'),
                                         (PARTLY, 'in part')])
def test_what_holds_and_what_does_not(cases, word):
    for place, (make, kw) in cases.items():
        assert judge(place, *make(np.random.default_rng(place), **kw)) == word, (place, kw)


def test_a_prediction_has_to_be_fast():
    tables = error(np.random.default_rng(0))
    for model_s, word in ((0.065, 'reproduced'), (0.063, 'not reproduced')):
        assert judge(9, tables[0], dict(model_s=model_s, blocks=16), tables[2]) == word


def test_no_worse_is_not_the_absence_of_a_difference():
    "Wide intervals around nothing show nothing; narrow ones around a little, that it is little"
    g = np.random.default_rng(1)
    assert judge(3, *rivals(g, noise=0.05)) != 'reproduced'
    assert judge(3, *rivals(g, noise=0.0003, ffp=0.5 * MARGIN)) == 'reproduced'
    assert judge(3, *rivals(g, noise=0.0003, ffp=1.5 * MARGIN)) == 'not reproduced'
    d = pd.Series([0.002, 0.004, 0.003], SEEDS)  # surely above 0, surely below the margin
    assert told(d.mean(), p_value(d)) == 'above' and no_worse(d)


def test_two_models_that_disagree_decide_nothing():
    "As in the study of schedules: all runs of one model are much cheaper, of the other hardly"
    g = np.random.default_rng(2)
    assert judge(4, *schedule(g, dict(a=3.0, b=1.05), models='ab')) == 'not reproduced'
    assert judge(5, *transfer(g, 0.0005, 0.02, models='ab')) == 'reproduced'


def test_seeds_of_a_model_are_not_independent():
    "Models that differ in no direction: pairs find one too often, models as often as they say"
    g, where = np.random.default_rng(3), pd.MultiIndex.from_product([MODELS, SEEDS],
                                                                     names=['model', 'seed'])
    of_pairs, of_models = [], []
    for _ in range(300):
        d = pd.Series(np.repeat(g.normal(0, 0.05, 3), 3) + g.normal(0, 0.01, 9), where)
        of_pairs.append(p_value(d) < 0.05)
        of_models.append(p_value(clusters(d)) < 0.05)
    assert np.mean(of_pairs) > 0.2 and 0.02 < np.mean(of_models) < 0.09


def test_holm_keeps_a_family_at_its_level():
    g = np.random.default_rng(4)
    families = [[p_value(v) for v in g.normal(size=(20, 4))] for _ in range(100)]
    assert np.mean([min(p) < 0.05 for p in families]) > 0.5
    assert np.mean([np.nanmin(holm(p)) < 0.05 for p in families]) < 0.09


def test_ablation_names_only_what_survives():
    "Changes that do nothing are not told apart; a regular one is, in its direction"
    def table(g, noise, **effect):
        names = ['default', *ablation.PARTS]
        t = runs_of(g, [('ffp', v) for v in names], noise, models='ab')
        t['nll'] += t.variant.map(effect).fillna(0) + g.normal(0, 1e-6, len(t))
        return t.assign(selection=t.nll)
    said = [ablation.findings(table(np.random.default_rng(i), 0.01)) for i in DRAWS]
    assert sum('none' not in x[0] or 'none' not in x[1] for x in said) <= 1
    better, worse, unknown, _ = ablation.findings(
        table(np.random.default_rng(0), 0, slow=0.1, rank=-0.1))
    only = lambda line, name: sum(x in line for x in ablation.PARTS.values()) == 1 and (
        ablation.PARTS[name] in line)
    assert only(better, 'rank') and only(worse, 'slow') and 'none' not in unknown


def test_recoveries_of_equal_policies_are_not_told_apart():
    g = np.random.default_rng(5)
    def table(lead):
        return pd.DataFrame([dict(policy=p, recovery=r, seed=s, nll=3 + g.normal(0, 0.02)
                                  - lead * p.startswith('search'))
                             for p in recovery.POLICIES for r in recovery.RECOVERIES
                             for s in SEEDS])
    lines = [x for _ in DRAWS for x in recovery.survival(table(0.0)) if x.startswith('- **')]
    assert sum('cut of each recovery: not told apart' not in x for x in lines) <= 2
    assert all('recovery: below with' in x for x in recovery.survival(table(3.0))[:3])
    assert all('recovery: above with' in x for x in recovery.survival(table(-3.0))[:3])


def test_one_agent_is_judged_against_the_strongest():
    "An even cut that is far worse does not make the claim; the one heuristic that is as good does"
    table, others = for_all_targets(np.random.default_rng(6), gain=0.6)
    assert judge(10, table, others) == 'reproduced'
    strong = pd.concat([others, others[:3].assign(policy='strong', nll=2.4)])
    assert judge(10, table, strong) == 'not reproduced'
    assert set(dynamic.below_strongest(table, strong).strongest) == {'strong'}


def test_the_predictor_is_not_chosen_by_what_it_is_judged_on():
    judged, timing, _ = error(np.random.default_rng(7), skill=0.5)
    judged['mse'] += 10 * judged.chosen  # the chosen one turns out to be the worst
    assert prediction.chosen(judged).mse['random'] > 10
    assert 'nats²' in prediction.judged_findings(judged, timing)[0]


def test_the_choice_does_not_read_what_is_judged(monkeypatch):
    "Cross-validation on the training policies alone: what the test policies cost changes nothing"
    names = {k: prediction.PREDICTORS[k] for k in ('ridge', 'spline')}
    monkeypatch.setattr(prediction, 'PREDICTORS', names)
    monkeypatch.setattr(prediction, 'SEEDS', (0,))
    g = np.random.default_rng(9)
    widths = g.integers(1, 9, (60, 2, 2))
    data = dict(widths=widths, X=widths.reshape(60, 4) / 8.0, source=np.array(['designed'] * 60),
                target=np.full(60, 0.3), calibrated=np.ones(60, bool))
    data['y'] = data['X'] @ [1, 2, 3, 4] + g.normal(0, 0.01, 60)
    found = prediction.measure_choice(data)['rows']
    assert [r['predictor'] for r in found] == [*names] and found[0]['mse'] < 0.5
    train, test = prediction.split(data, 'random', 0)
    assert len(test) == 12
    data['y'][test] = 1e6
    assert prediction.measure_choice(data)['rows'] == found
    data['y'][train] = 0.0
    assert prediction.measure_choice(data)['rows'] != found


def test_a_default_is_compared_with_its_own_pairs_only():
    "Claims read the tables of their study: extra searchers and targets change nothing"
    g = np.random.default_rng(8)
    mine, _ = rivals(g, noise=0.0005)
    more = pd.concat([mine, runs_of(g, [('ffp', 'late')], 1.0)])
    assert CLAIMS[3].rule(mine, None) == CLAIMS[3].rule(more, None)
    _, traces = schedule(g, dict(a=2.0, b=2.2, c=1.9))
    other = traces_of(g, PAIR, faster=dict(a=0.1), sparsity=0.3)
    assert CLAIMS[4].rule(None, traces) == CLAIMS[4].rule(None, pd.concat([traces, other]))
    assert schedules.STUDY.claims and searchers.STUDY.claims and allocation.STUDY.claims


def test_a_block_that_breaks_a_heuristic_is_told_and_left_out():
    (t,) = heuristics(np.random.default_rng(0), gain=dict(a=0.02), noise=0.001)
    best = t.index[(t.model == 'a') & (t.sparsity == 0.5) & (t.policy == 'flap')
                   & (t.calibration == 'sequential')]
    t.loc[best, 'nll'] -= 0.01  # the best heuristic, but for one block
    (i,) = best
    t.at[i, 'blocks'] = t.blocks[i] - 0.01 + np.where(np.arange(8) == 2, 4.0, 0)
    t.loc[i, 'nll'] = t.blocks[i].mean()
    t['ppl'] = np.exp(t.nll)
    few = allocation.without_broken(t)
    assert set(few.model) == {'a'} and few.lost.unique().tolist() == ['flap: 1 of 8']
    here = lambda t: t[(t.model == 'a') & (t.sparsity == 0.5)].iloc[0]
    with_it, without = (here(allocation.best_baseline(x)) for x in (t, few))
    assert with_it.rival != 'flap' == without.rival
    assert with_it.gain - without.gain == pytest.approx(0.01, abs=0.005)
    _, said = CLAIMS[1].rule(t)
    assert f'without test blocks that break a policy a at 0.5 has {without.gain:+.4f}' in said
    lines = [x for x in allocation.findings(t) if 'break a policy' in x]
    assert len(lines) == 1 and 'Without them, for all alike, the best baseline is flap' in lines[0]


def test_a_lead_in_means_alone_is_not_told_apart():
    "Three seeds that scatter as much as they differ, and three that do not"
    of = lambda method, nll: [dict(order='wanda', calibration='static', method=method, seed=k,
                                   ppl=np.exp(v)) for k, v in enumerate(nll)]
    t = pd.DataFrame(of('gradient', [4.0, 4.1, 4.2]) + of('cma', [4.3, 4.4, 4.501])
                     + of('tpe', [4.0, 4.5, 4.3]))
    found = slopes.rivals_above(t, 'wanda', 'static')
    assert found.loc['cma', 'holm'] < LEVEL < found.loc['tpe', 'holm']
    assert found.loc['tpe', 'mean'] == pytest.approx(1 / 6)


def test_what_travels_is_shown_by_pairs_and_not_by_a_share():
    rows = [dict(searched=a, applied=b, above=0.0 if a == b else 0.02 * (b == 'y') + 1e-4 * seed)
            for a in 'xyz' for b in 'xyz' for seed in range(3)]
    t = pd.DataFrame(rows).assign(nll=lambda t: 3 + t.above)
    found = criteria.travels(t)
    assert len(found) == 6 and found.no_worse.sum() == 4
    assert found['mean']['x', 'y'] == pytest.approx(0.0201)
    v = criteria.shares(t)
    assert v.sum() == pytest.approx(1) and v.interaction > v.searched and v.seeds < 0.05
