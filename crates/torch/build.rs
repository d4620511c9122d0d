//! Builds the shim, and lets the tests find libtorch where it was when they were built.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=shim/ops.cpp");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let Ok(folder) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("torch-sys does not say where libtorch is");
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    let include = Path::new(&folder).with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(include)
        .file("shim/ops.cpp")
        .compile("learn-torch");
}
