use qcompile_passes::rematerialise::{self, Saved};
use qcompile_plan::{BuildOptions, build};
use std::collections::BTreeSet;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let draft = qcompile::street::read_dump(&text, path.as_ref()).unwrap();
    let batch = 32;
    let g = draft.graph;
    let plan = build(g.clone(), &BuildOptions { batch_size: batch }).unwrap();
    let saved: Vec<Saved> =
        plan.saved().iter().map(|&(value, b)| Saved { value, bytes: b.at(batch) }).collect();
    let total: usize = saved.iter().map(|s| s.bytes).sum();
    let by = |p: &qcompile_plan::Plan| {
        let mut m = std::collections::BTreeMap::new();
        for s in p.slots() {
            *m.entry(format!("{:?}", s.storage)).or_insert(0usize) += s.bytes.at(batch);
        }
        m
    };
    println!("base {} saved {} {:?}", plan.bytes(batch), total, by(&plan));
    let verbose = std::env::args().nth(2).is_some();
    if verbose {
        for s in &saved {
            println!("  {:>12} {} {}", s.bytes, g.op(s.value).name(), g.node(s.value).name);
        }
    }
    let set: BTreeSet<_> = saved.iter().map(|s| s.value).collect();
    for h in 1..=6 {
        let order = rematerialise::order(&g, &saved, total >> h, batch);
        let freed: usize = saved.iter().filter(|s| order.contains(&s.value)).map(|s| s.bytes).sum();
        let mut n = g.clone();
        let made =
            rematerialise::run(&mut n, &set, &order.iter().copied().collect(), batch).unwrap();
        let p = build(n.clone(), &BuildOptions { batch_size: batch }).unwrap();
        println!(
            "bound {} values {} freed {} added {:.3} bytes {} saved {} {:?}",
            total >> h,
            made.values,
            freed,
            made.added,
            p.bytes(batch),
            p.saved_bytes(batch),
            by(&p)
        );
        if verbose && h == 2 {
            println!("{p}");
            for (v, b) in p.saved() {
                println!(
                    "  again-saved {:>12} {} {}",
                    b.at(batch),
                    n.op(*v).name(),
                    n.node(*v).name
                );
            }
        }
    }
}
