//! The committed code is what the `.proto` files give. `UPDATE=1 cargo test -p learn-proto` rewrites it.

use std::fs;
use std::path::Path;

#[test]
fn the_generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["learn/v1/control.proto", "learn/v1/embedding.proto", "learn/v1/operator.proto"];
    let descriptors = protox::compile(files, [root.join("proto")]).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .out_dir(scratch.path())
        .compile_fds(descriptors)
        .unwrap();
    let fresh = fs::read_to_string(scratch.path().join("learn.v1.rs")).unwrap();
    let committed = root.join("src/generated/learn.v1.rs");
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&committed, fresh).unwrap();
        return;
    }
    assert!(
        fs::read_to_string(&committed).is_ok_and(|text| text == fresh),
        "src/generated/learn.v1.rs is stale; run `UPDATE=1 cargo test -p learn-proto` and commit the result"
    );
}
