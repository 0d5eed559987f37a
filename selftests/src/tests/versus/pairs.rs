// SPDX-License-Identifier: GPL-2.0

//! The statistics of a row: pairs of times, one of each driver, measured one right after the other.
//!
//! What else the machine does changes from one moment to the next by more than the drivers differ.
//! Both times of a pair were measured at nearly the same moment, so their ratio varies less than
//! either of them. Copies of memory around each measured operation show whether the machine was
//! busy. Pairs in which one of the copies took long are left out of the figures. The copies do not
//! depend on the driver, and neither does the choice.

/// With fewer pairs even the least and the greatest ratio are no limits that hold with a probability of
/// 95 %.
const ENOUGH: usize = 6;

/// Copies that take this many times as long as the lower quartile show that the machine was busy.
const DISTURBED: f64 = 1.5;

/// One measurement, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub time: f64,
    /// The time of the two copies of as many bytes, before and after the operation.
    pub copies: f64,
}

/// One measurement of each driver, one right after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    pub theirs: Sample,
    pub ours: Sample,
}

impl Pair {
    /// The C driver's time divided by ours.
    fn ratio(&self) -> f64 {
        self.theirs.time / self.ours.time
    }

    /// The copies of the driver during whose measurement the machine was busier.
    fn slower_copies(&self) -> f64 {
        self.theirs.copies.max(self.ours.copies)
    }
}

/// A median, and the distance of the quartiles as a fraction of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Middle {
    pub median: f64,
    pub spread: f64,
}

impl Middle {
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let sorted = sorted(values);
        let [low, median, high] = [1, 2, 3].map(|part| quartile(&sorted, part));
        Self {
            median,
            spread: (high - low) / median,
        }
    }
}

/// What the interval of a ratio says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Ahead,
    Behind,
    /// The interval contains 1, or there are too few pairs.
    Even,
}

/// The figures of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// The C driver's time divided by ours: the mean of the ratios of the pairs, without the highest
    /// and the lowest quarter.
    pub ratio: f64,
    /// The limits between which the median of the ratios is with a probability of 95 %, if what
    /// disturbs one pair does not disturb another. With fewer than six pairs, the least and the
    /// greatest ratio.
    pub low: f64,
    pub high: f64,
    /// The ratio of the shortest times of all pairs.
    pub best: f64,
    pub theirs: Middle,
    pub ours: Middle,
    /// The copies of all pairs.
    pub copies: Middle,
    /// Which pairs the figures are about.
    pub kept: Vec<bool>,
}

impl Figures {
    /// The figures of `pairs`, of which there is at least one.
    pub fn of(pairs: &[Pair]) -> Self {
        let kept = undisturbed(pairs);
        let quiet: Vec<&Pair> = (pairs.iter().zip(&kept))
            .filter_map(|(pair, kept)| kept.then_some(pair))
            .collect();
        // The logarithm makes a ratio and its inverse equally distant from 1.
        let logs = sorted(quiet.iter().map(|pair| pair.ratio().ln()));
        let [low, high] = interval(logs.len()).map(|i| at(&logs, i).exp());
        let shortest = |time: fn(&Pair) -> f64| pairs.iter().map(time).fold(f64::NAN, f64::min);
        Self {
            ratio: midmean(&logs).exp(),
            low,
            high,
            best: shortest(|pair| pair.theirs.time) / shortest(|pair| pair.ours.time),
            theirs: Middle::of(quiet.iter().map(|pair| pair.theirs.time)),
            ours: Middle::of(quiet.iter().map(|pair| pair.ours.time)),
            copies: Middle::of(copies(pairs)),
            kept,
        }
    }

    pub fn standing(&self) -> Standing {
        if self.kept.iter().filter(|kept| **kept).count() < ENOUGH {
            Standing::Even
        } else if self.low > 1.0 {
            Standing::Ahead
        } else if self.high < 1.0 {
            Standing::Behind
        } else {
            Standing::Even
        }
    }
}

fn copies(pairs: &[Pair]) -> impl Iterator<Item = f64> {
    pairs
        .iter()
        .flat_map(|pair| [pair.theirs.copies, pair.ours.copies])
}

/// Which pairs were measured while the machine was not busy; at least that half in which it was
/// less busy than in the other one.
fn undisturbed(pairs: &[Pair]) -> Vec<bool> {
    let slower = sorted(pairs.iter().map(Pair::slower_copies));
    let quick = quartile(&sorted(copies(pairs)), 1);
    let limit = (DISTURBED * quick).max(at(&slower, slower.len().saturating_sub(1) / 2));
    pairs.iter().map(|p| p.slower_copies() <= limit).collect()
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn at(values: &[f64], i: usize) -> f64 {
    values.get(i).copied().unwrap_or(f64::NAN)
}

/// Quartile number `part`: 0 is the least value, 2 the median, 4 the greatest value.
fn quartile(sorted: &[f64], part: usize) -> f64 {
    at(sorted, sorted.len().saturating_sub(1) * part / 4)
}

/// The mean without the lowest and the highest quarter.
fn midmean(sorted: &[f64]) -> f64 {
    let cut = sorted.len() / 4;
    let middle = &sorted[cut..sorted.len() - cut];
    middle.iter().sum::<f64>() / middle.len() as f64
}

/// The least and the greatest of `n` sorted values between which their median is to be found with a
/// probability of 95 %, whatever their distribution: each value is above the true median or below
/// it, like the sides of a coin.
fn interval(n: usize) -> [usize; 2] {
    let n = n.max(1);
    let ways = |k: usize| (0..k).fold(1.0, |ways, i| ways * (n - i) as f64 / (i + 1) as f64);
    let each = 0.5f64.powi(n as i32);
    // The probability that at most `low` values are on one side of the median.
    let (mut low, mut outside) = (0, each);
    while low < (n - 1) / 2 && outside + ways(low + 1) * each <= 0.025 {
        low += 1;
        outside += ways(low) * each;
    }
    [low, n - 1 - low]
}

#[cfg(test)]
mod unit {
    use super::*;

    fn pair(theirs: f64, ours: f64, copies: [f64; 2]) -> Pair {
        let [one, other] = copies;
        Pair {
            theirs: Sample {
                time: theirs,
                copies: one,
            },
            ours: Sample {
                time: ours,
                copies: other,
            },
        }
    }

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn median_and_spread_of_a_few() {
        for (times, median, spread) in [
            (&[7.0][..], 7.0, 0.0),
            (&[30.0, 10.0, 20.0], 20.0, 0.5),
            (&[9.0, 1.0, 5.0, 3.0, 7.0], 5.0, 0.8),
        ] {
            let middle = Middle::of(times.iter().copied());
            assert_eq!(middle, Middle { median, spread });
        }
        assert!(Middle::of(std::iter::empty()).median.is_nan());
    }

    #[test]
    fn mean_of_the_middle() {
        for (values, mean) in [
            (&[4.0][..], 4.0),
            (&[1.0, 2.0, 6.0], 3.0),
            (&[-100.0, 1.0, 2.0, 100.0], 1.5),
            (&[-9.0, -9.0, 1.0, 2.0, 3.0, 4.0, 99.0, 99.0], 2.5),
        ] {
            near(midmean(values), mean);
        }
    }

    /// Values from tables of the sign test.
    #[test]
    fn intervals_of_the_median() {
        for (n, ends) in [
            (0, [0, 0]),
            (1, [0, 0]),
            (2, [0, 1]),
            (5, [0, 4]),
            (6, [0, 5]),
            (9, [1, 7]),
            (12, [2, 9]),
            (20, [5, 14]),
            (32, [9, 22]),
            (100, [39, 60]),
        ] {
            assert_eq!(interval(n), ends, "{n} values");
        }
    }

    #[test]
    fn a_ratio_survives_what_disturbs_both_or_few() {
        // The machine becomes twice as slow half way through, and four times are spoilt.
        let mut pairs: Vec<Pair> = (0..32)
            .map(|i| {
                let slow = if i < 16 { 1.0 } else { 1.4 };
                let noise = 1.0 + (i % 5) as f64 / 100.0;
                pair(120.0 * slow * noise, 100.0 * slow, [10.0 * slow; 2])
            })
            .collect();
        for i in [3, 4, 20, 21] {
            pairs[i].ours.time *= 10.0;
        }
        let figures = Figures::of(&pairs);
        assert!((1.2..1.25).contains(&figures.ratio), "{figures:?}");
        assert!(figures.low >= 1.2 && figures.high <= 1.25, "{figures:?}");
        assert_eq!(figures.standing(), Standing::Ahead);
        near(figures.best, 1.2);
        assert!(figures.kept.iter().all(|kept| *kept));
    }

    #[test]
    fn disturbed_pairs_are_left_out() {
        let quiet = pair(90.0, 100.0, [10.0, 10.0]);
        let mut pairs = vec![quiet; 8];
        // Either side's copies count, and times do not.
        pairs[1] = pair(500.0, 100.0, [40.0, 10.0]);
        pairs[4] = pair(90.0, 500.0, [10.0, 16.0]);
        pairs[5] = pair(90.0, 1000.0, [10.0, 14.0]);
        let figures = Figures::of(&pairs);
        let kept = [true, false, true, true, false, true, true, true];
        assert_eq!(figures.kept, kept);
        assert_eq!(figures.theirs.median, 90.0);
        near(figures.high, 0.9);
        near(figures.low, 0.09);
        assert_eq!(figures.standing(), Standing::Behind);
    }

    #[test]
    fn half_of_the_pairs_stay() {
        // The machine was quiet once only.
        let pairs: Vec<Pair> = (0..8)
            .map(|i| {
                pair(
                    100.0,
                    100.0,
                    [if i == 0 { 10.0 } else { 100.0 + i as f64 }; 2],
                )
            })
            .chain([pair(100.0, 100.0, [10.0; 2]); 4])
            .collect();
        let kept = Figures::of(&pairs).kept;
        assert_eq!(kept.iter().filter(|kept| **kept).count(), 6);
        assert!(kept[0] && kept[1] && !kept[2] && kept[11]);
    }

    #[test]
    fn one_pair_has_figures() {
        let figures = Figures::of(&[pair(50.0, 100.0, [1.0, 2.0])]);
        near(figures.ratio, 0.5);
        assert_eq!((figures.kept.len(), figures.kept[0]), (1, true));
        // One of two sides of a coin.
        assert_eq!(figures.standing(), Standing::Even);
        let figures = Figures::of(&[pair(50.0, 100.0, [1.0; 2]), pair(100.0, 50.0, [1.0; 2])]);
        near(figures.ratio, 1.0);
        assert_eq!(figures.standing(), Standing::Even);
    }
}
