// The kernel's argument, laid out as ilqr_vae.kernels.gpu.step packs it: eight bytes a field.

struct Streams {
    long long* age;
    real *mean, *precision, *z, *u, *counts, *mask;
};

struct Arguments {
    // of a launch
    long long streams, predicts;
    Streams before, after;
    const long long *sources, *targets, *limits;
    const real *bins_counts, *bins_mask;
    real* out;
    int* said;
    char* windows;
    // of a model
    long long iterations, backtracks;
    double tolerance, armijo, damping_min, damping_max, nu, constant;
    Streams initial;
    const real FIELDS;
};
